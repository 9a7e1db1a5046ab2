"""What lets other frameworks use this one: their registries, our advantages and tools."""
