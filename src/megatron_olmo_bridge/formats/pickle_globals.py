"""The classes and functions that a pickle may name, and the placeholder of each."""

from __future__ import annotations

import re
import sys
from typing import Any

from megatron_olmo_bridge.errors import UnsafePickleError, escape, quote

from .inert import Inert, inert, is_class

MAX_GLOBALS = 4000
"""Names of classes and functions. A checkpoint has some dozens; each takes about 1 kB."""
MAX_NAME_LENGTH = 512
# Names in real checkpoints. They become placeholders, so none of them can run anything; the list is
# narrow all the same, because any other name of these modules is a sign that the file is hostile.
_ALLOWED = re.compile(
    r"torch\.(Size|device|dtype|layout|memory_format|strided|contiguous_format|Tensor|Generator"
    r"|\w+Storage|b?float\d+(_\w+)?|u?int\d+|bool|long|half|float|double|complex\d+|finfo|iinfo)"
    r"|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_\w+"
    r"|torch\.serialization\._get_layout"
    r"|torch\.(nn\.(functional|init|modules|parameter)|functional|optim|_C\._nn)(\.\w+)+"
    r"|torch\._C\.(_VariableFunctions(Class)?|Generator|_distributed_c10d(\.[A-Z]\w*)+)"
    r"|torch\.distributed\.checkpoint\.\w+(\.\w+)*"
    r"|torch\.distributed\.(_shard|tensor|_tensor)(\.\w+)+"
    r"|olmo_core\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.distributed(\.\w+)*(\.[A-Z]\w*)+"
    r"|(megatron|transformer_engine|nemo)\.\w+(\.\w+)*"
    r"|numpy\.(dtype|ndarray|\w+\d+|bool_?)"
    r"|numpy\._?core\.(multiarray|numeric)\.(scalar|_reconstruct|_frombuffer)"
    r"|numpy\.dtypes\.\w+|numpy\.(exp|log|sqrt|tanh|mean|sum|abs|absolute|add|maximum|minimum)"
    r"|numpy\.random(\.\w+)?\.(__\w+_ctor|__pyx_unpickle_SeedSequence|[A-Z]\w*)"
    r"|pathlib\.(\w+\.)?(Pure)?(Posix|Windows)?Path"
    r"|argparse\._?[A-Z]\w*|types\.(SimpleNamespace|MappingProxyType|NoneType|GenericAlias)"
    r"|signal\.Signals"
    r"|collections\.(defaultdict|deque|Counter|ChainMap|User(Dict|List|String))"
    r"|collections\.OrderedDict|builtins\.(set|frozenset|bytearray|slice|complex|getattr)"
    r"|functools\.partial(method)?|enum\.[A-Z]\w*|dataclasses\._?[A-Z]\w*|typing\._?[A-Z]\w*"
    r"|datetime\.(date|datetime|time|timedelta|timezone)|zoneinfo\.ZoneInfo|time\.struct_time"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.(Safe)?UUID|ipaddress\.IPv\w+|random\.Random"
    r"|array\.(array|_array_reconstructor)|re\.(_compile|RegexFlag)|math\.\w+"
    r"|_?operator\.(add|sub|mul|truediv|floordiv|mod|eq|ne|lt|le|gt|ge|neg|getitem|itemgetter)"
    r"|logging\.(getLogger|Logger)|_codecs\.encode|copyreg\._reconstructor"
    r"|builtins\.(object|range|xrange|type|int|long|float|bool|str|unicode|bytes|list|tuple|dict"
    r"|len|min|max|sum|abs|round|sorted|Ellipsis|NotImplemented|\w+(Error|Exception|Warning))"
)
_KNOWN_MODULES = sys.stdlib_module_names | {"torch", "numpy"}
"""Modules of which only the names above are allowed, even with ``any_classes``."""
_CLASS = re.compile(r"_?[A-Z]\w*")
_BUILTIN_CLASSES = {"builtins.dict", "builtins.float", "datetime.date", "datetime.datetime"}
_SPECIAL = re.compile(r"__\w+__")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
"""Python 2 names of modules, which protocol 2 uses, as torch.save does."""


class Globals:
    """Placeholders of the globals that one pickle names."""

    def __init__(self, where: object, any_classes: bool) -> None:
        """Start without any.

        Args:
            where: the file, for messages.
            any_classes: allow classes of all modules but torch, numpy and the standard library,
                in addition to the names that are always allowed.
        """
        self._where, self._any_classes = where, any_classes
        self._placeholders: dict[tuple[str, str], type[Inert]] = {}
        self._unknown_functions: set[str] = set()

    def find(self, module: str, name: str) -> type[Inert]:
        """Return the placeholder of a global, always the same one.

        Raises:
            UnsafePickleError: the name has no place in a checkpoint.
            ValueError: it is too long, or the pickle names too many.
        """
        key = module, name
        if key not in self._placeholders:
            self._check_limits(key)
            self._placeholders[key] = inert(self._allowed(module, name))
        return self._placeholders[key]

    def _check_limits(self, key: tuple[str, str]) -> None:
        if sum(map(len, key)) > MAX_NAME_LENGTH or len(self._placeholders) >= MAX_GLOBALS:
            raise ValueError(f"too many names, or too long a name: {quote('.'.join(key))}")

    def _allowed(self, module: str, name: str) -> str:
        """Return the full name of a global, or raise UnsafePickleError."""
        full = f"{_PYTHON_2.get(module, module)}.{name}"
        *owners, last = name.split(".")
        # Through a module or a special attribute one gets anywhere: torch.nn.modules has torch.
        if all(map(_CLASS.fullmatch, owners)) and not _SPECIAL.fullmatch(last):
            if _ALLOWED.fullmatch(full):
                return full
            if self._any_classes and full.partition(".")[0] not in _KNOWN_MODULES:
                if not _CLASS.fullmatch(last):
                    self._unknown_functions.add(full)
                return full
        raise self._refusal(full)

    def call(self, function: type[Inert], args: tuple[Any, ...]) -> Inert | type[Inert]:
        """Return the placeholder of what a call returns.

        Raises:
            UnsafePickleError: nothing is known of the function.
            ValueError: as for :meth:`find`.
        """
        full = function.global_name
        if full == "builtins.getattr":
            return self._attribute(*args)
        if full in self._unknown_functions:
            raise UnsafePickleError(
                f"{self._where}: the pickle calls {full}, which is not known here. Nothing of it "
                "was run. If the file is your own, load it with the program that saved it, put "
                "plain values in the place of what the function makes, and save it again."
            )
        return function.called_with(args)

    def _attribute(self, owner: Any = None, name: Any = None, *rest: Any) -> type[Inert]:
        """Return the placeholder of a class's attribute: torch's functions are pickled so."""
        if is_class(owner) and isinstance(name, str) and not rest:
            of_class = _CLASS.fullmatch(owner.__name__) or owner.global_name in _BUILTIN_CLASSES
            if of_class and name.isidentifier() and not _SPECIAL.fullmatch(name):
                key = "builtins.getattr", f"{owner.global_name}.{name}"
                if key not in self._placeholders:
                    self._check_limits(key)
                    self._placeholders[key] = inert(key[1])
                return self._placeholders[key]
        raise self._refusal("builtins.getattr")

    def _refusal(self, full: str) -> UnsafePickleError:
        return UnsafePickleError(
            f"{self._where}: the pickle asks for {escape(full)}, which has no place in a "
            "checkpoint. Nothing of it was run. Don't load this file with other tools either."
        )
