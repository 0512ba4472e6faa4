"""Write a model to one file that other programs run, and prove that the file is the model.

The file is written beside its place, loaded and run there, compared with the model it came from,
and only then put where it belongs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export.graph_signature import TensorArgument
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from truenorm.calling.borrowing import unwrapped
from truenorm.calling.nested import mapped, tensors_in
from truenorm.data.datasets import Scaling
from truenorm.errors import InputError
from truenorm.files import write_atomically
from truenorm.folding.fold import Folded, fold
from truenorm.folding.modules import RawInput, dtype_of
from truenorm.folding.proof import distance
from truenorm.folding.subject import as_arguments, seeded

Format = Literal["onnx", "pt2"]
FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2"}
# Largest difference of outputs over the largest output: another runtime adds in another order.
BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_KEY = "truenorm"  # of the metadata in the file
_Run = Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]


@dataclass(frozen=True)
class Program:
    """An exported file, ready to run.

    Attributes:
        run: of args and kwargs to the output tensors.
        about: the metadata in the file.
    """

    run: _Run
    about: dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """A file that holds a model, and the proof that it does.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        error: largest difference of the file's outputs from those of the model given, over the
            largest output; on the example, on random inputs, and on other batch sizes.
        batch: "dynamic", or the one batch size that it takes.
        folded: what was folded before, or None if nothing was to be.
        about: the metadata in the file.
    """

    path: Path
    format: Format
    error: float
    batch: int | Literal["dynamic"]
    folded: Folded | None
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        found = {"pairs": [], "left": []} if self.folded is None else self.folded.to_dict()
        return {
            "path": str(self.path),
            "format": self.format,
            "batch": self.batch,
            **found,
            "error": self.error,
        }


def export(
    model: nn.Module,
    example_inputs: Any,
    path: Path | str,
    format: Format | None = None,
    *,
    fold_norms: bool = True,
    scaling: Scaling | None = None,
    about: Mapping[str, Any] | None = None,
) -> Exported:
    """Write ``model`` in eval mode as ONNX or as an exported program of torch.

    Args:
        model: any model that ``torch.export`` can trace; it is not changed.
        example_inputs: as :func:`truenorm.fold` takes them. Tensors whose first axis is as long as
            the first tensor's have a dynamic batch there.
        path: the file; one that exists is replaced once the new one is proved.
        format: "onnx" or "pt2"; by default what the suffix of ``path`` says.
        fold_norms: fold batch norms first (see :func:`truenorm.fold`).
        scaling: as :func:`truenorm.fold` takes it; it is part of the file even where nothing is
            folded.
        about: metadata for the file: plain values, as classes; ``scaling`` joins them.

    An ONNX file's inputs are called as the forward's arguments, its outputs by the keys of what it
    returns; a single tensor is "logits" where ``about`` has classes, else "output". The dynamic
    axis is "batch".

    Returns:
        The file, with the largest error of its outputs.

    Raises:
        InputError: the model cannot be traced or converted, or the file's outputs are not the
            model's; then there is no new file.
    """
    path = Path(path)
    chosen = _format_of(path, format)
    args, kwargs = as_arguments(example_inputs)
    args, kwargs, size = _two_or_more(args, kwargs)
    model = copy.deepcopy(unwrapped(model)).eval()
    for part in model.modules():
        part.training = False  # a model's own eval() may leave parts in train mode
    whole = model if scaling is None else RawInput(model, scaling.shift, scaling.scale)
    folded = None
    if fold_norms:  # a file has no other methods
        folded = fold(model, kwargs if kwargs else args, scaling=scaling, forward_only=True)
    ready = whole if folded is None else folded.model
    described = {
        **(about or {}),
        "version": metadata.version("truenorm"),
        "torch": torch.__version__,
    }
    if scaling is not None:
        described["scaling"] = scaling.to_json()
    proof: dict[str, Any] = {}

    def write(beside: Path) -> None:
        with _quiet():
            _WRITERS[chosen](ready, (args, kwargs), size, beside, described)
            run = _READERS[chosen](beside).run
        proof["error"], proof["batch"] = _proved(run, whole, (args, kwargs), size)

    write_atomically(path, write)
    return Exported(path, chosen, proof["error"], proof["batch"], folded, described)


def load_program(path: Path | str) -> Program:
    """Load what :func:`export` wrote.

    Raises:
        InputError: no such file, of no such format, or damaged.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: is no exported model; its name must end in .onnx or .pt2.")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file.")
    return _READERS[FORMATS[path.suffix]](path)


def _format_of(path: Path, format: str | None) -> Format:
    chosen = format or FORMATS.get(path.suffix)
    if chosen not in _WRITERS:
        raise InputError(
            f"format must be onnx or pt2, got {format or path.suffix!r}; name the file "
            f"{path.stem}.onnx or {path.stem}.pt2, or give format=."
        )
    return chosen  # type: ignore[return-value]


def _two_or_more(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The example with at least two rows: of one, a tracer takes the batch for a constant."""
    first = next(tensors_in((args, kwargs)), None)
    if first is None or not first.ndim:
        raise InputError("example_inputs must hold a tensor with a batch axis.")
    size = len(first)
    if size == 1:
        args, kwargs = (_of_size(part, 1, 2) for part in (args, kwargs))
    return args, kwargs, max(size, 2)


def _of_size(value: Any, size: int, wanted: int) -> Any:
    """Every tensor of ``size`` rows with as many as are wanted, repeated or cut."""

    def change(x: Tensor) -> Tensor:
        if not x.ndim or len(x) != size:
            return x
        return x[torch.arange(wanted) % size]

    return mapped(value, change)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters warn of what they themselves use, log what is not installed, and print."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# -- writing and reading --------------------------------------------------------------------------


def _traced(model: nn.Module, given: Any, size: int) -> torch.export.ExportedProgram:
    args, kwargs = given
    bound = inspect.signature(model.forward).bind(*args, **kwargs)

    def axes(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {0: torch.export.Dim.AUTO} if value.ndim and len(value) == size else {}
        if isinstance(value, Mapping):
            return {key: axes(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(axes(part) for part in value)
        return None

    shapes = {name: axes(value) for name, value in bound.arguments.items()}
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises a dozen kinds
        raise InputError(
            f"{type(model).__name__} cannot be traced by torch.export "
            f"({_first_line(error)}); its forward must not depend on the values of tensors."
        ) from error


def _write_onnx(model: nn.Module, given: Any, size: int, path: Path, about: Any) -> None:
    _need("onnxscript", "onnxruntime")
    program = _traced(model, given, size)
    try:
        made = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} has no ONNX form ({_first_line(error)}); use .pt2."
        ) from error
    assert made is not None
    _name(made, program, "logits" if "classes" in about else "output")
    made.model.metadata_props[_KEY] = json.dumps(about)
    made.save(str(path), external_data=False)


def _name(made: torch.onnx.ONNXProgram, program: torch.export.ExportedProgram, one: str) -> None:
    """Call outputs by the keys of what the model returns, and dynamic axes "batch".

    Args:
        made: changed in place.
        program: that it was made of.
        one: what an output without a key is called.
    """
    graph = made.model.graph
    taken = {given.name for given in graph.inputs}
    for output, key in zip(graph.outputs, _output_names(program, one), strict=True):
        name = key
        while name in taken:  # by an input, or another key with the same letters
            name += "_"
        taken.add(name)
        output.name = name
    sizes: dict[Any, str] = {}
    for given in graph.inputs:
        for size in given.shape or ():
            if not isinstance(size, int) and size.value is not None:
                sizes.setdefault(size.value, f"{given.name}_batch" if sizes else "batch")
    made.rename_axes(sizes)


def _output_names(program: torch.export.ExportedProgram, one: str) -> list[str]:
    """What leads to each tensor in what the program returns: "logits", "states_0"."""
    returned = program.graph_signature.output_specs
    spec = program.call_spec.out_spec
    assert spec is not None
    # The paths' keys are of several kinds, each with one field.
    places: Any = tree_flatten_with_path(tree_unflatten(range(len(returned)), spec))[0]
    tensors = [path for path, i in places if isinstance(returned[i].arg, TensorArgument)]
    names = []
    for path in tensors:
        entries: list[Any] = list(path)  # of an index, a key or a name each
        keys = [str(dataclasses.astuple(entry)[0]) for entry in entries]
        if len(tensors) == 1 and all(key.isdecimal() for key in keys):
            keys = []  # a tuple of one
        name = re.sub(r"\W+", "_", "_".join(keys))
        names.append(name if name and not name[0].isdecimal() else f"{one}_{name}".rstrip("_"))
    return names


def _read_onnx(path: Path) -> Program:
    _need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise InputError(f"{path}: onnxruntime cannot load it ({_first_line(error)}).") from error
    names = [given.name for given in session.get_inputs()]

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = [tensor.numpy() for tensor in tensors_in((args, kwargs))]
        outs = session.run(None, dict(zip(names, given, strict=True)))
        return [torch.from_numpy(out) for out in outs]

    about = session.get_modelmeta().custom_metadata_map
    return Program(run, _parsed(about.get(_KEY, "")))


def _write_pt2(model: nn.Module, given: Any, size: int, path: Path, about: Any) -> None:
    program = _traced(model, given, size)
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={_KEY: json.dumps(about)})


def _read_pt2(path: Path) -> Program:
    extra = {_KEY: ""}
    try:
        with open(path, "rb") as file, _quiet():
            module = torch.export.load(file, extra_files=extra).module()
    except Exception as error:
        raise InputError(f"{path}: torch.export cannot load it ({_first_line(error)}).") from error

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors_in(module(*args, **kwargs)))

    return Program(run, _parsed(str(extra[_KEY])))


def _parsed(text: str) -> dict[str, Any]:
    return dict(json.loads(text)) if text else {}


_WRITERS: dict[str, Callable[[nn.Module, Any, int, Path, Any], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
}
_READERS: dict[str, Callable[[Path], Program]] = {"onnx": _read_onnx, "pt2": _read_pt2}


def _need(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"ONNX needs {' and '.join(missing)}; install them with "
            "pip install 'truenorm[export]', or choose .pt2."
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


# -- proof ----------------------------------------------------------------------------------------


def _proved(
    run: _Run, model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], size: int
) -> tuple[float, int | Literal["dynamic"]]:
    """The largest error, and the batch sizes that the file takes.

    Raises:
        InputError: an error is too large, or the file does not run.
    """
    args, kwargs = given
    bound = BOUND.get(dtype_of(model), BOUND[torch.float32])
    worst = 0.0
    batch: int | Literal["dynamic"] = "dynamic"
    for wanted in (size, 1, size + 1):
        other = tuple(_of_size(part, size, wanted) for part in (args, kwargs))
        expected = list(tensors_in(seeded(model, *other)))
        try:
            got = run(*other)
        except Exception as error:
            if wanted != size:
                batch = size
                continue
            raise InputError(f"the exported file does not run ({_first_line(error)}).") from error
        apart = _largest(expected, got)
        if not apart <= bound:
            raise InputError(
                f"the exported file is not the model: its outputs differ by {apart:.1e} of the "
                f"largest at batch {wanted}, allowed {bound:.0e}; nothing was written."
            )
        worst = max(worst, apart)
    return worst, batch


def _largest(expected: list[Tensor], got: list[Tensor]) -> float:
    if len(expected) != len(got):
        return float("inf")
    errors = (distance(a.double(), b.double()) for a, b in zip(expected, got, strict=True))
    return max(errors, default=0.0)
