"""Audio, captions and manifests: from files on disk to batches."""
