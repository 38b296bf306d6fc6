"""Stage 2: CLIP on flipped images, image-text matching, the digit question."""
