"""Image-text pairs: sources, captions, caches, loaders."""
