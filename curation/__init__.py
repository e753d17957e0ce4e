"""Curation of audio-caption pairs by the similarity of their embeddings."""
