"""Decode, encode and resize images; contact sheets."""
