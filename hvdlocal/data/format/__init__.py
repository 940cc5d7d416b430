"""The files on disk: manifests, shards, and the numbers that both hold."""
