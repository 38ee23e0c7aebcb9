"""Sources become documents, documents become packed token rows with a hash-identified, resumable order."""

# Part of a corpus's identity: raise it when the same documents would be packed into other rows.
PACKING = 1
