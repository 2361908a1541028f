"""The paper's protocols on data sets, while a model trains and afterwards."""
