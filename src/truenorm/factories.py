"""A function that builds a user's model, named ``package.module:factory``: found and called.

What a factory takes goes by the names of its parameters: ``input_shape`` is the shape of one
example, (F,) or (C, H, W), ``classes`` or ``num_classes`` the number of logits. It needs to take
none of them. It returns a model, or a model and its batches.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from truenorm.errors import InputError

if TYPE_CHECKING:  # plans name factories without waiting for torch
    from torch import nn

_WHERE = "run where it can be imported, or add its folder to PYTHONPATH"


def is_factory(name: str) -> bool:
    """Whether a name is that of a factory; a path from a drive of Windows is none."""
    return ":" in name and not PureWindowsPath(name).root


def name_of(factory: Callable[..., Any]) -> str:
    """The name by which other processes import ``factory``; one of ``__main__`` only this does.

    Raises:
        InputError: it has none.
    """
    place, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    if getattr(sys.modules.get(place or ""), name, None) is not factory:
        kind = name or type(factory).__name__
        raise InputError(
            f"model must be a function of a module, which worker processes can import by name, got "
            f"{kind}; define it at the top of a module."
        )
    return f"{place}:{name}"


def offer(input_shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """What a factory may take, by the names of its parameters."""
    return {"input_shape": tuple(input_shape), "classes": classes, "num_classes": classes}


def found(text: str, what: str = _WHERE) -> tuple[ModuleType, Any]:
    """The module of ``package.module:factory``, imported, and the factory, or a model in its place.

    Args:
        text: which.
        what: the next step, for a message.

    Raises:
        InputError: there is none such. What the module raises itself passes.
    """
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
        raise InputError(f"{text}: no module named {error.name!r}; {near}{what}.") from error
    if not hasattr(module, name):
        near = _nearest(name, [n for n in dir(module) if callable(getattr(module, n))])
        raise InputError(f"{text}: module {place!r} has no attribute {name!r}; {near}{what}.")
    factory = getattr(module, name)
    from torch import nn

    if not isinstance(factory, nn.Module) and not callable(factory):
        raise InputError(f"{text}: is a {type(factory).__name__}, not a function; {what}.")
    return module, factory


def called(factory: Any, text: str, offered: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """What ``factory`` builds of what is offered: a model, and its batches or None.

    Raises:
        InputError: it takes other arguments, or returns no model. What it raises itself passes.
    """
    from torch import nn

    if isinstance(factory, nn.Module):
        return factory, None
    return _model_in(factory(**_taken(factory, text, offered)), text)


def _taken(factory: Callable[..., Any], text: str, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is offered what ``factory`` has parameters for."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # of some built-in callables
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in named
        if required and name not in offered:
            raise InputError(
                f"{text}: takes {name}, and a factory is given {', '.join(offered) or 'nothing'}"
                "; write a function that fills in the rest."
            )
    return {k: v for k, v in offered.items() if k in parameters and parameters[k].kind in named}


def _model_in(returned: Any, text: str) -> tuple[nn.Module, Any]:
    from torch import nn

    pair = isinstance(returned, (tuple, list)) and len(returned) == 2
    model, batches = returned if pair else (returned, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{text}: returned {type(model).__name__}, not a torch.nn.Module; a factory "
            "returns a model, or a model and its batches."
        )
    return model, batches


def _nearest(name: str, others: list[str]) -> str:
    near = difflib.get_close_matches(name, others, 1)
    return f"did you mean {near[0]}? Or " if near else ""


def digest_of(model: nn.Module, module: ModuleType) -> str:
    """A digest of all that makes ``model`` what it is: code, structure and tensors.

    The code is that of the factory's ``module`` and of the modules of all classes in it, but torch.
    """
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().double().numpy().tobytes())
    homes = {type(part).__module__ for part in model.modules()} | {module.__name__}
    for home in sorted(home for home in homes if home.partition(".")[0] != "torch"):
        digest.update(_source_of(sys.modules[home]))
    return digest.hexdigest()


def _source_of(module: ModuleType) -> bytes:
    """Its file's text; nothing for one without, as of a notebook."""
    file = Path(getattr(module, "__file__", None) or "")
    return file.read_bytes() if file.is_file() else b""


# What is the user's own -----------------------------------------------------------------------


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
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason = reason if len(reason) < 500 else f"{reason[:500]}..."
        raise InputError(f"{what}: {reason}{_place(error)}") from error


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code, or nothing."""
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others) and "site-packages" not in frame.filename:
            return f" ({relative(frame.filename)}, line {frame.lineno})"
    return ""


def relative(file: str | Path) -> str:
    """A path as seen from here, if it lies below."""
    path = Path(file)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
