"""Stand-in for Transformer Engine: megatron-core can import it, but nothing in it works."""

IMPORTABLE = '''
"""Has whatever is imported from it: capitalised names are classes, others modules."""
import importlib, importlib.abc, importlib.machinery, sys, types

__version__ = "2.20.2"

class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__module__": "transformer_engine"})
        return importlib.import_module(f"{self.__name__}.{name}")

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("transformer_engine."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
from . import common, pytorch
'''
