"""The paper's protocols on data sets, whatever holds the embeddings: a run, or a directory."""
