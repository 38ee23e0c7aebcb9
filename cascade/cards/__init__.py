"""What a person reads of a stage and of a family: cards in Markdown with pictures in SVG.

Nothing here touches a store or Prefect: an index goes in, text comes out.
"""
