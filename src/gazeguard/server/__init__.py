"""An OpenAI-compatible chat server whose every answer is judged by the guard.

`app.create_app` makes the ASGI application, `run.serve` runs it; both need the extra `server`.
"""
