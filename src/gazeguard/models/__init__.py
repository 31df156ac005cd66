"""Loading models: from an id or folder to a `Target` that knows where its tokens are."""
