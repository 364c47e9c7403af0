"""Giving a module a new class in place, and its old class back.

The object stays: its parameters keep their names, hooks fire, tied weights stay tied, references
elsewhere stay valid. PyTorch's `fully_shard` and `parametrize` do the same. What a class must do to
be handed out this way is in `InPlaceModule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Container
from types import MethodType
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from gralora.engines.distributed import is_spread

FROZEN = "_gralora_frozen"
REPLICATED = "_gralora_replicated"
LOADED = "_is_hf_initialized"
"""What transformers sets on a module once its parameters have been loaded, or initialised where the
checkpoint lacks them.
"""


class InPlaceModule(nn.Module):
    """Base of every class that a module is given in place: it knows the class that was there and
    runs its forward.

    A `forward` set on the instance (as `accelerate` does) hides the class's own, which would leave
    an adapter silently dead. One that was there before counts as part of the base's forward; one
    set later wraps ours.
    """

    _base_class: ClassVar[type[nn.Module]] = nn.Module
    _prefix: ClassVar[str]  # of the names of made classes

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module as it was before its class changed."""
        instance_forward = self.__dict__.get("_base_instance_forward")
        if instance_forward is not None:
            return instance_forward(*args, **kwargs)
        return self._base_class.forward(self, *args, **kwargs)

    def bound_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments that are given to the base's forward, in the order of its signature.

        Raises:
            TypeError: they do not fit it, as it would raise itself.
        """
        if not kwargs and len(args) == 1:
            return [args[0]]
        instance_forward = self.__dict__.get("_base_instance_forward")
        forward = instance_forward or MethodType(self._base_class.forward, self)
        signature, found = inspect.signature(forward), list[Any]()
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found.extend(value)
            elif kind is inspect.Parameter.VAR_KEYWORD:
                found.extend(value.values())
            else:
                found.append(value)
        return found

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        child = own["_modules"].get(name) if "_modules" in own else None
        if child is not None:
            return child
        value: Any = super().__getattr__(name)
        if value is None or not (name in own["_parameters"] or name in own["_buffers"]):
            return value
        if isinstance(value, Proxy):
            return _traced_read(self, name, value) if name in self.effective_names else value
        return self.effective_parameter(name, value)

    @property
    def effective_names(self) -> Container[str]:
        """The parameters that may read as something else than they are."""
        return ()

    def effective_parameter(self, name: str, value: Tensor) -> Tensor:
        """What code that reads a parameter or buffer by its name gets; `value` is the module's
        own.
        """
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if (
            name == LOADED
        ):  # transformers has given the parameters their values, in new objects that are trained
            for frozen in self.__dict__.get(FROZEN, ()):
                parameter = self._parameters.get(frozen)
                if parameter is not None:
                    parameter.requires_grad_(False)
        # accelerate replaces and removes its hooks by setting `forward`, to a wrapper round the
        # bound method that it once found. If that is the base's, the wrapper belongs under the
        # adapter, not over it.
        if name == "forward" and _innermost(value) == MethodType(self._base_class.forward, self):
            self.__dict__.pop("_base_instance_forward", None)
            if hasattr(value, "__wrapped__"):
                self.__dict__["_base_instance_forward"] = value
        elif isinstance(value, Tensor) and name in self.__dict__.get(REPLICATED, ()):
            self._parameters[name] = value  # type: ignore[assignment]  # so that it is read as the parameter is
        elif isinstance(value, nn.Parameter) and name in self._parameters:
            nn.Module.register_parameter(self, name, value)  # as `fully_shard` sets them
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # of all who replace a weight, `parallelize_module` alone calls this; it can't place what it
        # knows nothing of
        if is_spread(param) and self._parameters.get(name) is not None:
            raise ValueError(
                f"{self} is adapted, and parallelize_module cannot spread adapters. First"
                " parallelise the plain model, then inject (or load_adapter): adapters follow the"
                " placement of the weight."
            )
        super().register_parameter(name, param)

    def _replicate_for_data_parallel(self) -> Any:
        # a replica gets its tensors as plain attributes, which hide from `__getattr__`
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__[REPLICATED] = frozenset(self._parameters)
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A made class has no name that pickle could find; its two parents have.
        reduced = super().__reduce_ex__(protocol)
        mixin = vars(type(self)).get("_mixin")
        return reduced if mixin is None else (_new, (mixin, self._base_class), *reduced[2:])


InPlace = TypeVar("InPlace", bound=InPlaceModule)

_made: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}


def made_class(mixin: type[InPlace], original: type[nn.Module]) -> type[InPlace]:
    """The class `(mixin, original)`, made once; `mixin` itself where it already stands on
    `original`.
    """
    if vars(mixin).get("_base_class") is original:
        return mixin
    made = _made.get((mixin, original))
    if made is None:
        name = f"{mixin._prefix}{original.__name__}"
        space = {
            "_base_class": original,
            "_mixin": mixin,
            "__module__": mixin.__module__,
            "__doc__": original.__doc__,
        }
        later = getattr(original, "cls_to_become", None)  # of a lazy module
        if later is not None:
            space["cls_to_become"] = made_class(mixin, later)
        made = type(name, (mixin, original), space)
        if not _may_follow(original, made):
            made = _over(original)(name, (original,), space)
        _made[mixin, original] = made
    found: type[InPlace] = made
    return found


def _may_follow(original: type[nn.Module], made: type) -> bool:
    """Whether Python lets an object of class `original` become one of class `made`."""
    blank = nn.Module.__new__(original)
    try:
        blank.__class__ = made
    except TypeError:
        return False
    return True


def _over(original: type[nn.Module]) -> type:
    """A metaclass of classes that have `original` for their only base, and look up what their mixin
    has first.

    Python asks of a new `__class__` that the chains of first bases be alike. In `class X(ABC,
    nn.Linear)` that chain leads by ABC, and no class `(mixin, X)` has such a one.
    """

    def mro(cls: Any) -> list[type]:
        mixin = vars(cls).get("_mixin")
        if mixin is None:  # derived from the made class
            return type.mro(cls)
        own = [each for each in mixin.__mro__ if each not in original.__mro__]
        return [cls, *own, *original.__mro__]

    return type(f"Over{type(original).__name__}", (type(original),), {"mro": mro})


def traced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The node of a graph that calls `module`, where torch.fx traces the forward; None where nobody
    does.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Proxy):
            tracer: Any = value.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
    return None


def _traced_read(module: nn.Module, name: str, proxy: Proxy) -> Any:
    """The node of a graph that reads a parameter of `module` each time, where torch.fx would take
    the parameter itself.
    """
    tracer: Any = proxy.tracer
    owner = tracer.create_proxy("get_attr", tracer.path_of_module(module), (), {})
    return tracer.create_proxy("call_function", getattr, (owner, name), {})


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, without the one that `torch.nn.utils.parametrize` has put over it."""
    return type(module).__bases__[0] if _is_parametrized(module) else type(module)


def set_own_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` another class beneath the one that `parametrize` has put over it, if it has.

    `remove_parametrizations` takes the properties off the outermost class and leaves the module
    with the class beneath, so `parametrize`'s must stay the outermost.
    """
    over = type(module)
    module.__class__ = _with_base(over, cls) if _is_parametrized(module) else cls


def _is_parametrized(module: nn.Module) -> bool:
    # without a property of a parametrized tensor, the outermost class is yet another
    return parametrize.is_parametrized(module) and any(
        parametrize.is_parametrized(module, name) for name in vars(type(module))
    )


def _with_base(over: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """`parametrize`'s class `over`, on another base; the class it was made of, if that fits."""
    space = {key: value for key, value in vars(over).items() if key not in _OF_ONE_CLASS}
    earlier: type[nn.Module] | None = vars(over).get(_MADE_OF)
    if earlier is not None and earlier.__bases__ == (base,):
        if space == {key: value for key, value in vars(earlier).items() if key in space}:
            return earlier
    return type(f"Parametrized{base.__name__}", (base,), {**space, _MADE_OF: over})


_MADE_OF = "_gralora_made_of"
_OF_ONE_CLASS = ("__dict__", "__weakref__", "_abc_impl", _MADE_OF)


def change_class(module: nn.Module, mixin: type[InPlace]) -> InPlace:
    """Give `module` the class `(mixin, its class)`, and return it as one of that class."""
    set_own_class(module, made_class(mixin, own_class(module)))
    if "forward" in module.__dict__:
        module.__dict__["_base_instance_forward"] = module.__dict__.pop("forward")
    return cast(InPlace, module)


def is_restorable(module: InPlaceModule) -> bool:
    """Whether the class of `module` is one that `change_class` gives, and not one derived from
    it.
    """
    return "_base_class" in vars(own_class(module))


def restore_class(module: InPlaceModule) -> None:
    """Give `module` back the class, and the instance-level forward, that it had before
    `change_class`.

    A class that somebody derived from ours is left: without adapters it is the base.
    """
    if not is_restorable(module):
        return
    ours = cast(type[InPlaceModule], own_class(module))
    base_forward = MethodType(ours._base_class.forward, module)
    for name, value in list(module.__dict__.items()):
        # kept by a tool that wrapped the adapted forward
        if isinstance(value, MethodType) and value == MethodType(ours.forward, module):
            module.__dict__[name] = base_forward
    instance_forward = module.__dict__.pop("_base_instance_forward", None)
    set_own_class(module, ours._base_class)
    if instance_forward is not None:
        module.__dict__.setdefault("forward", instance_forward)


def freeze_own(module: nn.Module) -> None:
    """Stop training the parameters that hang on `module` itself, and remember which were
    trained.
    """
    trained = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad}
    for parameter in trained.values():
        parameter.requires_grad = False  # the parameters of lazy modules have no requires_grad_
    if trained:
        module.__dict__[FROZEN] = (*module.__dict__.get(FROZEN, ()), *trained)


def thaw_own(module: nn.Module) -> None:
    """Undo every `freeze_own` of `module`."""
    frozen = module.__dict__.pop(FROZEN, ())
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad = True


def join(path: str, key: str) -> str:
    """A qualified name; `path` is empty for the model itself."""
    return f"{path}.{key}" if path else key


def _innermost(forward: Any) -> Any:
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def _new(mixin: type[InPlaceModule], original: type[nn.Module]) -> InPlaceModule:
    cls = made_class(mixin, original)
    return cls.__new__(cls)


def one_line(module: nn.Module, text: str) -> str:
    return f"{type(module).__name__}({text})"


def held(owner: nn.Module, name: str) -> Any:
    """What is under a parameter's name in `owner`: the parameter, what stands in for it, or what is
    computed from others.
    """
    parameters = owner._parameters
    return parameters[name] if name in parameters else getattr(owner, name, None)
