"""What a text is worth: AR-NLL under a judge, MAUVE, diversity, and the table that shows them side by side.

One metric per file. Texts come in as strings and tokens as lists of integers; only `likelihood` knows the model.
"""
