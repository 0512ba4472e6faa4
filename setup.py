"""The build's one step beyond pyproject.toml: the kernels are compiled, where that is possible."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).parent / "src/truenorm/kernels/build.py"))


class BuildKernels(build_ext):
    """Compiles by the package's own way, which ``python -m truenorm.kernels.build`` takes too."""

    def build_extension(self, ext: Extension) -> None:
        try:
            BUILD["compile_library"](Path(self.get_ext_fullpath(ext.name)))
        except BUILD["NoKernelsError"] as error:
            print(f"TrueNorm's kernels were not compiled, torch's own are used: {error}.")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".abi3.so"))

    def copy_extensions_to_source(self) -> None:
        made = (Path(self.build_lib, self.get_ext_filename(ext.name)) for ext in self.extensions)
        if all(library.exists() for library in made):
            super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("truenorm.kernels._kernels", [], optional=True, py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
