"""Time and memory of decoding: sides in processes of their own, taking turns on one prompt."""
