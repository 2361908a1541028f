"""Models on disk: ours, and those of other projects."""
