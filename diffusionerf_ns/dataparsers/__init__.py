"""Data parsers for captures of few views."""
