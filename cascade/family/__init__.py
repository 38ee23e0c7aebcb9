"""The family: the graph of its nodes, how one node is run, what each kind does, and the index of a build."""
