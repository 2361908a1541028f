"""The paper's measures and statistics, as pure functions of arrays."""
