// PgJDBC. Started as a source file: java -cp postgresql.jar Jdbc.java

import java.io.StringReader;
import java.io.StringWriter;
import java.sql.*;
import java.util.*;
import java.util.concurrent.*;
import org.postgresql.PGConnection;
import org.postgresql.copy.CopyManager;
import org.postgresql.util.PSQLException;

public class Jdbc {
    static final String HOST = told("HOST"), PORT = told("PORT"), TENANT = told("TENANT"), CA = told("CA");
    static final Map<String, Map<String, String>> LOGINS = new LinkedHashMap<>();
    static final Map<String, Map<String, String>> TLS = new LinkedHashMap<>();
    static boolean failed = false;

    static {
        String app = told("APP_USER"), password = told("APP_PASSWORD");
        LOGINS.put("own login", login(TENANT, told("TENANT_PASSWORD"), TENANT));
        LOGINS.put("app.tenant", login(app + "." + TENANT, password, "postgres"));
        LOGINS.put("app@tenant", login(app + "@" + TENANT, password, "tenants"));
        LOGINS.put("options", login(app, password, "postgres", "options", "-c pgusher.tenant=" + TENANT));
        LOGINS.put("database", login(app, password, TENANT));
        // As ApplicationName it comes in the startup packet only from this version of the protocol's parameters on.
        LOGINS.put("application_name", login(app, password, "postgres", "ApplicationName", TENANT + "/worker", "assumeMinServerVersion", "9.4"));
        TLS.put("defaults", Map.of());
        TLS.put("plain", Map.of("sslmode", "disable"));
        TLS.put("require", Map.of("sslmode", "require"));
        TLS.put("verify-full", Map.of("sslmode", "verify-full", "sslrootcert", CA));
    }

    interface Work { void run() throws Exception; }

    static String told(String name) { return System.getenv("PGUSHER_TEST_" + name); }

    static Map<String, String> login(String user, String password, String database, String... more) {
        Map<String, String> login = new HashMap<>(Map.of("user", user, "password", password, "PGDBNAME", database));
        for (int i = 0; i < more.length; i += 2) login.put(more[i], more[i + 1]);
        return login;
    }

    static Connection connect(Map<String, String> login, String tls, String... more) throws SQLException {
        Properties properties = new Properties();
        properties.putAll(login);
        properties.putAll(TLS.get(tls));
        for (int i = 0; i < more.length; i += 2) properties.put(more[i], more[i + 1]);
        String database = (String) properties.remove("PGDBNAME");
        return DriverManager.getConnection("jdbc:postgresql://" + HOST + ":" + PORT + "/" + database, properties);
    }

    static Connection admin() throws SQLException {
        return DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + told("ADMIN_PORT") + "/" + told("ADMIN_DATABASE"),
            "postgres", told("ADMIN_PASSWORD"));
    }

    static void check(String name, Work work) {
        try {
            work.run();
            System.out.println("ok\t" + name);
        } catch (Throwable error) {
            failed = true;
            StackTraceElement at = Arrays.stream(error.getStackTrace()).filter(e -> e.getClassName().equals("Jdbc")).skip(error instanceof AssertionError ? 1 : 0)
                .findFirst().orElse(null);
            System.out.println("FAIL\t" + name + "\t" + error.toString().replaceAll("\\s+", " ") + " (line " + (at == null ? "?" : at.getLineNumber()) + ")");
        }
    }

    static void equal(Object found, Object expected) {
        if (!Objects.equals(found, expected)) throw new AssertionError("found " + found + ", expected " + expected);
    }

    /** The first row, columns joined by |. */
    static String row(Connection connection, String sql, Object... values) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement(sql)) {
            for (int i = 0; i < values.length; i++) statement.setObject(i + 1, values[i]);
            try (ResultSet rows = statement.executeQuery()) {
                if (!rows.next()) return null;
                List<String> columns = new ArrayList<>();
                for (int i = 1; i <= rows.getMetaData().getColumnCount(); i++) columns.add(rows.getString(i));
                return String.join("|", columns);
            }
        }
    }

    static void execute(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) { statement.execute(sql); }
    }

    static SQLException failure(Work work) throws Exception {
        try {
            work.run();
        } catch (SQLException error) {
            return error;
        }
        throw new AssertionError("there is no error");
    }

    static void connecting(String tls) {
        LOGINS.forEach((name, login) -> check(tls + ": connect: " + name, () -> {
            try (Connection connection = connect(login, tls)) {
                equal(row(connection, "SELECT session_user, current_schema(), count(*) FROM bookings WHERE false"), TENANT + "|" + TENANT + "|0");
            }
        }));
    }

    static void parameters() {
        Map<String, String> own = LOGINS.get("own login");
        check("currentSchema: the tenant's own", () -> {
            try (Connection connection = connect(own, "defaults", "currentSchema", TENANT)) {
                equal(connection.getSchema(), TENANT);
                equal(row(connection, "SELECT count(*) FROM bookings WHERE false"), "0");
                execute(connection, "RESET ALL");
                equal(connection.getSchema(), TENANT);
            }
        });
        check("currentSchema: another's is refused", () -> {
            SQLException error = failure(() -> connect(own, "defaults", "currentSchema", "client_002").close());
            equal(error.getSQLState().startsWith("42") || error.getSQLState().startsWith("28"), true);
        });
        check("options, DateStyle, time zone", () -> {
            TimeZone.setDefault(TimeZone.getTimeZone("Asia/Tokyo"));
            try (Connection connection = connect(own, "defaults", "options", "-c statement_timeout=54321")) {
                equal(row(connection, "SELECT current_setting('statement_timeout'), current_setting('TimeZone')"), "54321ms|Asia/Tokyo");
                // What it SETs after connecting stays with the session, which in transaction mode it has none of.
                if (!told("POOL_MODE").equals("transaction")) equal(row(connection, "SHOW extra_float_digits"), "3");
            }
        });
        check("wrong password", () -> {
            SQLException error = failure(() -> connect(login(TENANT, "wrong", TENANT), "defaults").close());
            equal(error.getSQLState(), "28P01");
        });
        check("preferQueryMode=simple", () -> {
            try (Connection connection = connect(own, "defaults", "preferQueryMode", "simple")) {
                equal(row(connection, "SELECT ?::int + 1", 41), "42");
            }
        });
    }

    static void suite(String tls) throws SQLException {
        Connection connection = connect(LOGINS.get("own login"), tls);
        execute(connection, "DROP TABLE IF EXISTS t_jdbc; CREATE TABLE t_jdbc (id int PRIMARY KEY, t text, at timestamptz)");

        check(tls + ": parameters", () -> {
            equal(row(connection, "INSERT INTO t_jdbc VALUES (?, ?, now()) RETURNING t", 1, "quote ' and ü"), "quote ' and ü");
            try (PreparedStatement statement = connection.prepareStatement("SELECT ?::int[]")) {
                statement.setArray(1, connection.createArrayOf("int4", new Object[] {1, 2}));
                ResultSet rows = statement.executeQuery();
                rows.next();
                equal(rows.getString(1), "{1,2}");
            }
        });

        check(tls + ": batch with generated keys", () -> {
            try (PreparedStatement statement = connection.prepareStatement("INSERT INTO t_jdbc (id, t) VALUES (?, ?)", new String[] {"id"})) {
                for (int i = 100; i < 1100; i++) {
                    statement.setInt(1, i);
                    statement.setString(2, "batch");
                    statement.addBatch();
                }
                equal(Arrays.stream(statement.executeBatch()).sum(), 1000);
                int keys = 0;
                for (ResultSet rows = statement.getGeneratedKeys(); rows.next();) keys++;
                equal(keys, 1000);
            }
        });

        check(tls + ": COPY in and out", () -> {
            StringBuilder lines = new StringBuilder();
            for (int i = 2000; i < 22000; i++) lines.append(i).append("\tline\n");
            CopyManager copy = connection.unwrap(PGConnection.class).getCopyAPI();
            equal(copy.copyIn("COPY t_jdbc (id, t) FROM STDIN", new StringReader(lines.toString())), 20000L);
            StringWriter out = new StringWriter();
            copy.copyOut("COPY (SELECT id, t FROM t_jdbc WHERE id >= 2000 ORDER BY id) TO STDOUT", out);
            equal(out.toString().contentEquals(lines), true);
        });

        check(tls + ": a transaction that rolls back", () -> {
            connection.setAutoCommit(false);
            execute(connection, "DELETE FROM t_jdbc");
            Savepoint savepoint = connection.setSavepoint();
            equal(failure(() -> execute(connection, "SELECT 1/0")).getSQLState(), "22012");
            connection.rollback(savepoint);
            equal(row(connection, "SELECT count(*) FROM t_jdbc"), "0");
            connection.rollback();
            equal(row(connection, "SELECT count(*) FROM t_jdbc"), "21001");
            connection.commit();
            connection.setAutoCommit(true);
        });

        check(tls + ": read only and isolation", () -> {
            connection.setAutoCommit(false);
            connection.setReadOnly(true);
            equal(failure(() -> execute(connection, "DELETE FROM t_jdbc")).getSQLState(), "25006");
            connection.rollback();
            connection.setReadOnly(false);
            equal(row(connection, "SHOW transaction_read_only"), "off");
            connection.commit();
            connection.setAutoCommit(true);
        });

        check(tls + ": an error", () -> {
            SQLException error = failure(() -> row(connection, "INSERT INTO t_jdbc VALUES (?) RETURNING id", 1));
            equal(error.getSQLState(), "23505");
            equal(((PSQLException) error).getServerErrorMessage().getConstraint(), "t_jdbc_pkey");
            equal(row(connection, "SELECT 1"), "1");
        });

        check(tls + ": cancel", () -> {
            PreparedStatement statement = connection.prepareStatement("SELECT pg_sleep(?) /* cancel_jdbc */");
            statement.setInt(1, 60);
            Future<SQLException> outcome = Executors.newSingleThreadExecutor().submit(() -> failure(() -> statement.executeQuery()));
            try (Connection admin = admin()) {
                long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(30);
                while (row(admin, "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() AND query LIKE '%cancel_jdbc%'") == null) {
                    if (System.nanoTime() > deadline) throw new AssertionError("the query does not run");
                    Thread.sleep(10);
                }
            }
            statement.cancel();
            equal(outcome.get().getSQLState(), "57014");
            for (int i = 0; i < 50; i++) equal(row(connection, "SELECT ?::int", i), String.valueOf(i));
        });

        check(tls + ": query timeout", () -> {
            try (Statement statement = connection.createStatement()) {
                statement.setQueryTimeout(1);
                equal(failure(() -> statement.execute("SELECT pg_sleep(60)")).getSQLState(), "57014");
            }
            equal(row(connection, "SELECT 1"), "1");
        });

        check(tls + ": prepared statements used many times", () -> {
            for (int i = 0; i < 300; i++) equal(row(connection, "SELECT ?::int + 1", i), String.valueOf(i + 1));
            try (Connection eager = connect(LOGINS.get("own login"), tls, "prepareThreshold", "1")) {
                for (int i = 0; i < 250; i++) equal(row(eager, "SELECT " + i + " + ?::int", 1), String.valueOf(i + 1));
            }
        });

        check(tls + ": fetch size", () -> {
            connection.setAutoCommit(false);
            try (Statement statement = connection.createStatement()) {
                statement.setFetchSize(100);
                ResultSet rows = statement.executeQuery("SELECT generate_series(1, 5000)");
                long sum = 0;
                while (rows.next()) sum += rows.getLong(1);
                equal(sum, 12502500L);
            }
            connection.commit();
            connection.setAutoCommit(true);
        });

        check(tls + ": metadata", () -> {
            DatabaseMetaData data = connection.getMetaData();
            Set<String> tables = new TreeSet<>();
            for (ResultSet rows = data.getTables(null, TENANT, "%", new String[] {"TABLE"}); rows.next();) tables.add(rows.getString("TABLE_NAME"));
            equal(tables.containsAll(List.of("bookings", "services", "users")), true);
            List<String> columns = new ArrayList<>();
            for (ResultSet rows = data.getColumns(null, TENANT, "bookings", "%"); rows.next();) columns.add(rows.getString("COLUMN_NAME"));
            equal(columns, List.of("id", "user_id", "service_id", "starts_at", "note"));
            ResultSet keys = data.getPrimaryKeys(null, TENANT, "bookings");
            equal(keys.next() ? keys.getString("COLUMN_NAME") : null, "id");
            for (ResultSet rows : List.of(data.getImportedKeys(null, TENANT, "bookings"), data.getIndexInfo(null, TENANT, "bookings", false, false),
                data.getSchemas(), data.getCatalogs(), data.getFunctions(null, TENANT, "%"), data.getTypeInfo(), data.getTablePrivileges(null, TENANT, "%"))) rows.next();
        });
        connection.close();
    }

    public static void main(String[] arguments) throws Exception {
        TLS.keySet().forEach(Jdbc::connecting);
        parameters();
        for (String tls : List.of("plain", "verify-full")) suite(tls);
        System.exit(failed ? 1 : 0);
    }
}
