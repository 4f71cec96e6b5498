"""The data recipe: raw files → training files. prepare_data.py runs it; docs/DATA.md says what it does and why."""
