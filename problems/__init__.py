"""The problems that metavpt ships: vision on labelled frames, language, and a toy with a known answer."""
