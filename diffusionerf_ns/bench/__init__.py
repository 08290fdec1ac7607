"""The benchmark: runs of scenes x views x seeds x variants, and their tables and plots."""
