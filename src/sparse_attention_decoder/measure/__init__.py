"""Reads results, never called from below: what sparse decoding costs and keeps."""
