"""SQLAlchemy over psycopg 3 and psycopg2: create_all, introspection, a pool with pre-ping, sessions."""

import concurrent.futures

import sqlalchemy as sa
from sqlalchemy import orm

from kit import APP, APP_PASSWORD, HOST, OWN, PORT, TENANT, check, equal, finish


class Base(orm.DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "sa_author"
    __table_args__ = {"comment": "who writes"}
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str] = orm.mapped_column(sa.String(50), unique=True, comment="in full")
    kind: orm.Mapped[str] = orm.mapped_column(sa.Enum("poet", "novelist", name="sa_kind"), server_default="poet")
    books: orm.Mapped[list["Book"]] = orm.relationship(back_populates="author", cascade="all, delete-orphan")


class Book(Base):
    __tablename__ = "sa_book"
    id: orm.Mapped[int] = orm.mapped_column(sa.BigInteger, sa.Identity(), primary_key=True)
    author_id: orm.Mapped[int] = orm.mapped_column(sa.ForeignKey("sa_author.id"), index=True)
    title: orm.Mapped[str]
    author: orm.Mapped[Author] = orm.relationship(back_populates="books")


for driver in ("psycopg", "psycopg2"):
    url = sa.URL.create(f"postgresql+{driver}", OWN["user"], OWN["password"], HOST, PORT, OWN["database"])
    engine = sa.create_engine(url, pool_size=3, max_overflow=2, pool_pre_ping=True)

    with check(f"{driver}: create_all"):
        Base.metadata.drop_all(engine)
        Base.metadata.create_all(engine)
        Base.metadata.create_all(engine)

    with check(f"{driver}: introspection"):
        inspector = sa.inspect(engine)
        equal({"sa_author", "sa_book", "bookings"} <= set(inspector.get_table_names()), True)
        equal(inspector.default_schema_name, TENANT)
        equal(TENANT in inspector.get_schema_names(), True)
        equal([c["name"] for c in inspector.get_columns("sa_book")], ["id", "author_id", "title"])
        equal(inspector.get_pk_constraint("sa_author")["constrained_columns"], ["id"])
        key = inspector.get_foreign_keys("sa_book")[0]
        equal((key["referred_table"], key["referred_schema"]), ("sa_author", None))
        equal(inspector.get_indexes("sa_book")[0]["column_names"], ["author_id"])
        equal(inspector.get_unique_constraints("sa_author")[0]["column_names"], ["name"])
        equal(inspector.get_table_comment("sa_author"), {"text": "who writes"})
        equal("sa_kind" in [e["name"] for e in inspector.get_enums()], True)
        inspector.get_view_names(), inspector.get_materialized_view_names(), inspector.get_sequence_names()
        reflected = sa.MetaData()
        reflected.reflect(engine)
        equal("sa_book" in reflected.tables, True)

    with check(f"{driver}: sessions"):
        with orm.Session(engine) as session:
            session.add_all(Author(name=f"n{n}", books=[Book(title=f"b{n}-{i}") for i in range(3)]) for n in range(50))
            session.commit()
            equal(session.scalar(sa.select(sa.func.count()).select_from(Book)), 150)
            author = session.scalars(sa.select(Author).options(orm.selectinload(Author.books)).where(Author.name == "n7")).one()
            equal(sorted(book.title for book in author.books), ["b7-0", "b7-1", "b7-2"])
            session.delete(author)
            session.rollback()
            equal(session.scalar(sa.select(sa.func.count()).select_from(Author)), 50)
            try:
                with session.begin_nested():
                    session.add(Author(name="n1"))
                    session.flush()
                raise AssertionError("the unique violation is missing")
            except sa.exc.IntegrityError:
                pass
            session.add(Author(name="new"))
            session.commit()

    with check(f"{driver}: 60 requests share 5 connections"):
        def request(number, engine=engine):
            with orm.Session(engine) as session:
                return session.scalar(sa.select(Author.id).where(Author.name == f"n{number % 50}")) is not None

        with concurrent.futures.ThreadPoolExecutor(10) as threads:
            equal(all(threads.map(request, range(60))), True)

    with check(f"{driver}: isolation level"):
        with engine.connect().execution_options(isolation_level="SERIALIZABLE") as connection:
            equal(connection.scalar(sa.text("SHOW transaction_isolation")), "serializable")
        with engine.connect() as connection:
            equal(connection.scalar(sa.text("SHOW transaction_isolation")), "read committed")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            equal(connection.scalar(sa.text("SELECT 1")), 1)

    with check(f"{driver}: stream_results"):
        with engine.connect().execution_options(stream_results=True, max_row_buffer=100) as connection:
            equal(sum(row[0] for row in connection.execute(sa.text("SELECT generate_series(1, 5000)"))), 12502500)

    with check(f"{driver}: as the application user"):
        url = sa.URL.create(f"postgresql+{driver}", f"{APP}.{TENANT}", APP_PASSWORD, HOST, PORT, "postgres")
        other = sa.create_engine(url)
        with other.connect() as connection:
            equal(connection.scalar(sa.text("SELECT count(*) FROM sa_author")), 51)
        other.dispose()

    with check(f"{driver}: drop_all"):
        Base.metadata.drop_all(engine)
        equal("sa_book" in sa.inspect(engine).get_table_names(), False)
    engine.dispose()

finish()
