"""These tests run Triton's interpreter, which a process must choose before it imports triton.

``tests/kernels/test_kernels_interpreter.py`` runs them in a process of their own.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
