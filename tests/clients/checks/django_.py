"""Django's ORM over psycopg 3: migrate, queries, transactions, iterators, inspectdb."""

import io
import sys
import threading
import types

import django
from django.conf import settings

from kit import HOST, OWN, PORT, TENANT, check, equal, finish

settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql", "HOST": HOST, "PORT": PORT, "USER": OWN["user"],
            "PASSWORD": OWN["password"], "NAME": OWN["database"], "CONN_MAX_AGE": 60, "CONN_HEALTH_CHECKS": True,
        }
    },
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions", "django.contrib.admin"],
    USE_TZ=True, SECRET_KEY="test", DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.contrib.auth.models import Group, User  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import IntegrityError, connection, models, transaction  # noqa: E402

sys.modules["shop"] = types.ModuleType("shop")


class Note(models.Model):
    text = models.TextField()
    doc = models.JSONField(default=dict)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        app_label = "shop"
        db_table = "django_note"


def run(*words):
    out = io.StringIO()
    call_command(*words, stdout=out)
    return out.getvalue()


with check("migrate"):
    run("migrate", "--verbosity", "1")
with check("migrate once more changes nothing"):
    equal("No migrations to apply" in run("migrate"), True)
with check("tables are the tenant's"):
    with connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE 'auth_%%' AND tableowner = session_user")
        equal(cursor.fetchall(), [(TENANT,)])
with check("schema editor"):
    with connection.schema_editor() as editor:
        if "django_note" in connection.introspection.table_names():
            editor.delete_model(Note)
        editor.create_model(Note)
with check("users and groups"):
    User.objects.all().delete()
    Group.objects.all().delete()
    group = Group.objects.create(name="staff")
    for number in range(20):
        User.objects.create(username=f"u{number}").groups.add(group)
    equal(User.objects.filter(groups__name="staff", username__startswith="u1").count(), 11)
    equal(User.objects.select_related().prefetch_related("groups").get(username="u3").groups.first().name, "staff")
with check("a transaction that rolls back"):
    try:
        with transaction.atomic():
            User.objects.all().delete()
            raise ValueError("ours")
    except ValueError:
        pass
    equal(User.objects.count(), 20)
with check("an error in a savepoint"):
    with transaction.atomic():
        try:
            with transaction.atomic():
                User.objects.create(username="u1")
            raise AssertionError("the unique violation is missing")
        except IntegrityError:
            pass
        equal(User.objects.count(), 20)
with check("bulk_create and JSON"):
    Note.objects.bulk_create(Note(text="ü" * number, doc={"n": number}) for number in range(3000))
    equal(Note.objects.filter(doc__n__gte=2990).count(), 10)
with check("iterator (a cursor that is held)"):
    with transaction.atomic():
        equal(sum(note.doc["n"] for note in Note.objects.iterator(chunk_size=100)), 4498500)
with check("select_for_update"):
    with transaction.atomic():
        equal(Note.objects.select_for_update().first().text, "")
with check("threads have connections of their own"):
    found = []

    def work():
        try:
            found.append(User.objects.count())
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    equal(found, [20] * 6)
with check("inspectdb, introspection"):
    equal("class Bookings" in run("inspectdb", "bookings"), True)
    with connection.cursor() as cursor:
        names = {table.name for table in connection.introspection.get_table_list(cursor)}
        equal({"auth_user", "bookings"} <= names, True)
        constraints = connection.introspection.get_constraints(cursor, "auth_user_groups")
        equal(sum(bool(c["foreign_key"]) for c in constraints.values()), 2)
with check("flush"):
    run("flush", "--no-input")
    equal(User.objects.count(), 0)
with check("migrate to zero"):
    for app in ("admin", "auth", "sessions", "contenttypes"):
        run("migrate", app, "zero")

finish()
