"""These tests run Triton's interpreter, which a process must choose before it imports triton.

``tests/kernels/test_kernels_interpreter.py`` runs them in a process of their own.
"""

import os
from dataclasses import replace

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from triton.runtime.interpreter import interpreter_builder

    # It computes whether integers overflow and, without its debug option, drops what it found: half of the time.
    if not interpreter_builder.options.debug:
        interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)
