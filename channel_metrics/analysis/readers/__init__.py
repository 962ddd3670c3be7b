"""Readers of log formats, and the meaning of log keys.

| module | what |
|---|---|
| `sources` | the list of formats; finds the logs of a run |
| `format`, `files`, `lines` | what a format is; a folder; compressed files and UTF-16 |
| `parts` | tells resumed parts of one run from separate runs |
| `json_logs`, `trainer_state`, `event_files`, `wandb_files`, ... | one reader each |
| `text_logs` | the list of forms that programs print; a `..._lines` module each |
| `keys` | what a log key means |
"""
