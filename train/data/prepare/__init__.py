"""From text to a prepared corpus: a folder of token shards, with where each document came from.

Owns what is read as text, how it becomes tokens, and the folder's content. Any kill leaves either
a whole corpus or work that the same call takes up again; the result never depends on how often
that happened, nor on the number of processes. Refuses to know torch or the run's config: called by
the command `trimtab prepare` and by `train.data.corpus`.
"""
