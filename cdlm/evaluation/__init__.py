"""How good texts are: AR-NLL under a judge, MAUVE and diversity in one table; and how likely text is to a model.

Nothing here reads a configuration or a run folder: texts, rows, judges and sessions are passed in.
"""
