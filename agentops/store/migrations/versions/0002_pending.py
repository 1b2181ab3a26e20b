"""What a waiting run asks for is kept with the run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run", sa.Column("pending_hash", sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column("run", "pending_hash")
