"""The paper's evaluation: from a checkpoint to its tables and figures."""
