"""A trained model answers: many questions in batches (`answer`), a person in a `talk`, lmms-eval (`lmms`).

`answer_file` keeps answers through a crash, `processes` share the questions; `terminal` and `web` show a talk.
"""
