"""Stage 3: clusters, semantic deduplication, cluster importance and copies."""
