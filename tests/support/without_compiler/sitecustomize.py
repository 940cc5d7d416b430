"""Python imports this module when it starts with this directory on PYTHONPATH: torch's compiler is then an empty module.

torch's optimizers import their compiler at the first step, which takes a third of the time of a short run, and nothing is
compiled here.
"""

import sys
import types

_compiler = types.ModuleType("torch._dynamo")
_compiler.graph_break = lambda: None
_compiler.disable = lambda function, *_, **__: function
sys.modules["torch._dynamo"] = _compiler
