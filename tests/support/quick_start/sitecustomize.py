"""Python imports this module when it starts with this directory on PYTHONPATH: a short job then needs two thirds of the time.

* torch's compiler is an empty module. torch's optimizers import it at their first step, and nothing is compiled here.
* Garbage is collected less often, and no longer at the end of the process: what importing torch makes is in use until then.
"""

import atexit
import gc
import sys
import types

_compiler = types.ModuleType("torch._dynamo")
_compiler.graph_break = lambda: None
_compiler.disable = lambda function, *_, **__: function
sys.modules["torch._dynamo"] = _compiler

gc.set_threshold(100_000)
atexit.register(gc.freeze)
