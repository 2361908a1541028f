"""pyarrow.compute, most of whose functions are made at import, unseen by type checkers."""

from typing import Any

import pyarrow.compute

compute: Any = pyarrow.compute
