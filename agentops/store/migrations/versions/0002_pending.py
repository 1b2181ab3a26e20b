"""What a waiting run asks for is kept with the run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from agentops.store.kinds import WORD

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run", sa.Column("pending_hash", WORD, nullable=True))


def downgrade() -> None:
    op.drop_column("run", "pending_hash")
