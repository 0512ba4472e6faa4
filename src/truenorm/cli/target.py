"""What a command examines: a run folder, a factory of a module, or a checkpoint's tensors."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import itertools
import json
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.data.datasets import Dataset, Scaling, in_batches
from truenorm.data.sources import load
from truenorm.doctor.facts import MOST_BATCHES
from truenorm.errors import InputError
from truenorm.layers.batch_norm import BatchNorm
from truenorm.training.run import Run, load_model, write_atomically

BATCH_SIZE = 64  # of data given to a factory's model
_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # a mended model so named is written as torch does
_WHAT = "give a run folder, package.module:factory or a checkpoint"


@dataclass(frozen=True)
class Target:
    """A model to examine.

    Attributes:
        model: in the mode it came in; a run's and a checkpoint's in eval mode.
        batches: of training data, that can be gone through again, or None.
        held_out: batches of other data with targets, or None.
        save: writes the model to a file.
        name: as it was given.
        file: the file it comes from, where a report places findings.
    """

    model: nn.Module
    batches: Iterable[Any] | None
    held_out: list[Any] | None
    save: Callable[[Path], None]
    name: str
    file: str


def open_target(
    text: str,
    data: str | None = None,
    target: str | None = None,
    *,
    most: int | None = MOST_BATCHES,
) -> Target:
    """Open a run folder, ``package.module:factory``, or a checkpoint.

    Args:
        text: what to open. A factory takes no argument and returns a model, or a model and its
            batches; a checkpoint gives its tensors alone.
        data: a data source as for ``truenorm train``; by default a run's own.
        target: the label's column.
        most: batches of training data to take at most; None for all.

    Raises:
        InputError: nothing such exists, or it cannot be read.
    """
    path = Path(text)
    if path.is_dir():
        return _of_run(path, data, target, most)
    if is_checkpoint(text):
        return _of_checkpoint(path, data)
    if ":" in text:
        return _of_factory(text, data, target, most)
    if path.exists():
        raise InputError(f"{text}: is no checkpoint ({', '.join(_CHECKPOINTS)}); {_WHAT}.")
    raise InputError(
        f"cannot examine {text!r}: it is no run folder, no checkpoint "
        f"({', '.join(_CHECKPOINTS)}) and not package.module:factory."
    )


def is_checkpoint(text: str) -> bool:
    """Whether it names a file that :func:`open_target` takes for a checkpoint."""
    return Path(text).suffix in _CHECKPOINTS and not Path(text).is_dir()


@contextlib.contextmanager
def foreign(what: str) -> Iterator[None]:
    """Run code of the user's: what it prints goes to stderr, what it raises is one message.

    Raises:
        InputError: the body raised something else, which the text tells with its place.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a script may exit with 0, which would mean healthy
        told = " ".join(f"{type(error).__name__}: {error}".split())
        told = told if len(told) < 500 else f"{told[:500]}..."
        raise InputError(f"{what}: {told}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code, or nothing."""
    others = (str(Path(__file__).parent.parent), sysconfig.get_path("stdlib"), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in frame.filename:
            return f" ({_relative(frame.filename)}, line {frame.lineno})"
    return ""


def _relative(file: str | Path) -> str:
    """A path as seen from here, if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _of_run(folder: Path, data: str | None, target: str | None, most: int | None) -> Target:
    try:
        run = Run.open(folder)
        request = run.request()
    except InputError as error:
        files = sorted(p for p in folder.iterdir() if is_checkpoint(str(p)))
        raise InputError(f"{error}" + (f" Or give {files[0]}." if files else "")) from error
    trained = load_model(folder)
    source = data or request.data
    if not isinstance(source, str):
        raise InputError(f"{folder}: was trained on arrays; name a source with --data.")
    splits = load(source, target=target or trained.target, seed=request.train.seed)
    trained.accept(splits.train.x[:1], source)
    size = request.train.batch_size

    def save(out: Path) -> None:
        with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        _save(trained.model, out, metadata)

    return Target(
        trained.model,
        _batches(splits.train, size, trained.scaling, most=most),
        _batches(splits.valid, size, trained.scaling, most=None),
        save,
        str(folder),
        str(folder / "model.safetensors"),
    )


def _batches(data: Dataset, size: int, scaling: Scaling, *, most: int | None) -> list[Any]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    cut = in_batches(data, order, size, scaling, torch.device("cpu"))
    return [(batch.x, batch.y) for batch in itertools.islice(cut, most)]


def _of_factory(text: str, data: str | None, target: str | None, most: int | None) -> Target:
    with foreign(text):
        module, made = _called(text)
        pair = isinstance(made, (tuple, list)) and len(made) == 2
        model, batches = made if pair else (made, None)
        if not isinstance(model, nn.Module):
            raise InputError(
                f"{text}: returned {type(model).__name__}, not a torch.nn.Module; a factory "
                "returns a model, or a model and its batches."
            )
        if data is None and isinstance(batches, Iterator):  # it can be gone through only once
            batches = list(itertools.islice(batches, most))
    held: list[Any] | None = None
    if data is not None:
        splits = load(data, target=target)
        batches = _batches(splits.train, BATCH_SIZE, splits.scaling, most=most)
        held = _batches(splits.valid, BATCH_SIZE, splits.scaling, most=None)
    file = _relative(getattr(module, "__file__", None) or text)
    return Target(model, batches, held, lambda out: _save(model, out, None), text, file)


def _called(text: str) -> tuple[ModuleType, Any]:
    """The module of ``package.module:factory``, and what the factory returns."""
    place, _, name = text.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: modules beside the caller are found
    if not place or not name:
        raise InputError(f"{text}: give package.module:factory.")
    if place.endswith(".py"):
        dotted = ".".join(Path(place).with_suffix("").parts)
        raise InputError(f"{text}: give the module as it is imported, {dotted}:{name}.")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise  # the module exists, and lacks one itself
        near = _nearest(place, [p.stem for p in Path().glob("*.py")])
        raise InputError(f"{text}: no module named {error.name!r}; {near}{_WHAT}.") from error
    if not hasattr(module, name):
        near = _nearest(name, [n for n in dir(module) if callable(getattr(module, n))])
        raise InputError(f"{text}: module {place!r} has no attribute {name!r}; {near}{_WHAT}.")
    made = getattr(module, name)
    if isinstance(made, nn.Module):
        return module, made
    if not callable(made):
        raise InputError(f"{text}: is a {type(made).__name__}, not a function; {_WHAT}.")
    return module, made()


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, 1)
    return f"did you mean {near[0]}? Or " if near else ""


def _save(model: nn.Module, out: Path, metadata: dict[str, str] | None) -> None:
    tensors = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key}: is {type(value).__name__} in the state dict, which a file of tensors "
                "cannot hold; mend the model in Python with truenorm.examine(...).fix()."
            )
        tensors[key] = value.detach().cpu().contiguous().clone()
    whole = io.BytesIO()  # written by torch itself, a full disk gives an obscure error
    if out.suffix in _PICKLED:
        torch.save(tensors, whole)
    else:
        whole.write(safetensors.torch.save(tensors, metadata))
    write_atomically(out, lambda path: path.write_bytes(whole.getvalue()))


# -- checkpoints ----------------------------------------------------------------------------------


def _of_checkpoint(path: Path, data: str | None) -> Target:
    if data is not None:
        raise InputError("a checkpoint has no model to run data through; leave --data out.")

    def refuse(out: Path) -> None:
        raise InputError("a checkpoint has no model to mend; give package.module:factory.")

    model = _carrier(_tensors(path))
    return Target(model, None, None, refuse, str(path), str(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; of several state dicts with the path to each."""
    held = _read(path)
    if not isinstance(held, Mapping):
        raise InputError(f"{path}: holds {type(held).__name__}, not a dictionary of tensors.")
    found = dict(_state_dicts(held, ()))
    if not found:
        raise InputError(
            f"{path}: holds no running_mean and running_var, so no batch norm to examine."
        )
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{place}.{k}": v for place, held in found.items() for k, v in held.items()}


def _read(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty.")
    try:
        if path.suffix == ".safetensors":
            held = safetensors.torch.load_file(path)
            return {key: held[key] for key in sorted(held, key=_natural)}  # it keeps no order
        with warnings.catch_warnings():  # what they say of a file is said below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise InputError(f"{path}: {_why_unread(path, error)}") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by in which 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _why_unread(path: Path, error: Exception) -> str:
    script = "TorchScript" in str(error)
    named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if not script and named is None:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"is damaged, or no checkpoint ({told})."
    if named is None:
        what, whole = "TorchScript", f"torch.jit.load('{path}').state_dict()"
    else:
        what = f"Python objects beside tensors ({named[1]})"
        whole = f"torch.load('{path}', weights_only=False)['state_dict']"
    return (
        f"holds {what}; reading such can run code, so it was not read. If you trust the file, save "
        f"its tensors alone and give that: torch.save({whole}, 'tensors.pt'); of a whole "
        "module it is .state_dict(). Or give package.module:factory, a function that loads it."
    )


def _state_dicts(
    held: Mapping[Any, Any] | list[Any] | tuple[Any, ...], place: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in ``held`` with running statistics, by where it is: a model, its EMA."""
    entries = list(held.items() if isinstance(held, Mapping) else enumerate(held))
    tensors = {str(k): v for k, v in entries if isinstance(v, Tensor)}
    if _norms_of(tensors):
        yield ".".join(place), _unwrapped(tensors)
    for key, value in entries:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _state_dicts(value, (*place, str(key)))


def _norms_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the keys of batch norms; a scalar's running statistics are something else."""
    names = [k.removesuffix("running_var") for k in tensors if k.endswith("running_var")]
    return [
        n
        for n in names
        if (not n or n.endswith("."))
        and f"{n}running_mean" in tensors
        and tensors[f"{n}running_mean"].ndim == 1
        and tensors[f"{n}running_mean"].shape == tensors[f"{n}running_var"].shape
    ]


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them, without what torch.compile and DDP put before them."""
    names = [key.replace("_orig_mod.", "") for key in tensors]
    while all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def _carrier(tensors: dict[str, Tensor]) -> nn.Module:
    """A model that only holds: batch norms, and the other tensors in modules of their names.

    Those of floating point are taken for parameters; a checkpoint does not say. Sparse ones and
    those of one byte, which torch cannot compare, are left out.
    """
    names = _norms_of(tensors)
    root = _norm(tensors, "") if "" in names else nn.Module()
    for name in filter(None, names):
        *where, last = name.rstrip(".").split(".")
        _within(root, where)._modules[_free(last)] = _norm(tensors, name)
    taken = {f"{name}{field}" for name in names for field in _FIELDS}
    shared: dict[tuple[Any, ...], nn.Parameter] = {}
    for key, tensor in tensors.items():
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 2
        if key in taken or narrow or tensor.layout != torch.strided:
            continue
        *where, last = key.split(".")
        module = _within(root, where)
        if tensor.is_floating_point() or tensor.is_complex():
            # Shared storage is one parameter under two names, as in the model.
            place = tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()
            parameter = shared.setdefault(place, nn.Parameter(tensor, requires_grad=False))
            module._parameters[last] = parameter
        else:
            module._buffers[last] = tensor
    return root.eval()


_FIELDS = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")


def _norm(tensors: dict[str, Tensor], name: str) -> nn.Module:
    """A batch norm with the tensors of ``name``."""
    mean = tensors[f"{name}running_mean"]
    learned = {}
    for key in ("weight", "bias"):
        tensor = tensors.get(f"{name}{key}")
        fits = tensor is not None and tensor.shape == mean.shape  # else it is another layer's
        learned[key] = nn.Parameter(tensor, requires_grad=False) if fits else None  # type: ignore[arg-type]
    # The momentum is not in a checkpoint; None keeps every judgement on it out.
    layer = BatchNorm(len(mean), momentum=None, affine=learned["weight"] is not None)
    layer._parameters.update(learned)
    counted = tensors.get(f"{name}num_batches_tracked")
    if counted is None or counted.numel() != 1:
        # Without a count nothing says that it was never updated, unless its values do.
        counted = torch.tensor(0)
    layer._buffers.update(
        running_mean=mean, running_var=tensors[f"{name}running_var"], num_batches_tracked=counted
    )
    return layer


def _within(root: nn.Module, path: list[str]) -> nn.Module:
    """The module at ``path`` under ``root``, made if it is missing."""
    for part in path:
        name = _free(part)
        child = root._modules.get(name)
        if child is None:
            child = root._modules[name] = nn.Module()
        root = child
    return root


def _free(name: str) -> str:
    """``name`` as a submodule may have it: no module's is that of a method, a dictionary's can."""
    return f"{name}_" if not name or hasattr(_BARE, name) else name


_BARE = nn.Module()


def known(baseline: Path) -> set[tuple[str, str | None]]:
    """Code and layer of every finding in an earlier diagnosis's JSON.

    Raises:
        InputError: the file is none.
    """
    if not baseline.exists():
        raise InputError(f"{baseline}: no such file.")
    try:
        held = json.loads(baseline.read_text("utf-8"))["findings"]
        return {(finding["code"], finding["layer"]) for finding in held}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{baseline}: is no diagnosis; make one with truenorm doctor TARGET --format json "
            "--out FILE."
        ) from error
