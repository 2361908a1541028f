"""The paper's construction of a set: queries, the captions that hold them, a balance."""
