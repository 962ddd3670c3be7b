"""What is wrong with a run: losses that are not finite, that rise, or that another run beats.

| module | what |
|---|---|
| `means` | means of stretches of a series, and how much of a difference is noise |
| `trends` | each loss judged by its own past, evaluations against training, too |
| `nonfinite` | the step from which a loss is NaN or infinite |
| `versus` | a run compared with the first one |
| `finding`, `losses_told`, `told` | all findings in words, for the terminal and the report |
"""
