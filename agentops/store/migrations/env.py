"""Alembic's entry: runs the revisions on the connection that the store hands over."""

from __future__ import annotations

from alembic import context
from sqlmodel import SQLModel

import agentops.store.tables  # noqa: F401 - fills the metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=SQLModel.metadata)
with context.begin_transaction():
    context.run_migrations()
