"""The page: one panel per verb, made from its spec. The only package that imports gradio."""
