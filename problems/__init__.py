"""The shipped problems: vision on labelled frames, language, and a toy with a known answer."""
