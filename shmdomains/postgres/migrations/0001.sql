-- The schema `shmdomains`: lists of domains for any number of hosts. PostgreSQL 14 or later.
--
-- Locks are advisory locks of the session, with 64-bit keys: a tag in the upper 16 bits (23809 and
-- the kind), a number below. They vanish with the session. What a lock needs beyond that, who took
-- it and whether he let go of it, stands in the row (`domains`, `mutexes`):
--
--   lock    take the advisory lock, then mark the row and read it: one UPDATE, whose snapshot is
--           younger than the lock. (That of the statement which waited for the lock is older.)
--   unlock  change the state, clear the mark, let go of the advisory lock: one transaction. If the
--           session ends before that transaction does, nothing of it is there, and the mark says
--           who died. The lock is handed to the transaction (`let_go`), so it is free when all
--           others see what was done, and not before.
--
-- A commit also writes its number into the row of its session (`sessions.done`). If the answer is
-- lost, that row says whether the commit was.
--
-- Marks of who holds what need not outlive a crash of the server by themselves, so locking alone
-- never waits for the disk or for a standby (synchronous_commit off). A mark is lost at most for
-- the last moments before a crash. A token must never be given twice, so each life of the server has
-- its own, from life * 2^40: after a crash, that of a single backend included, and on a standby that
-- was promoted, the unlogged table `life` is empty. The first session writes the next number, and
-- that to the disk.

CREATE TABLE lists (
    list bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name <> ''),
    events_max integer NOT NULL CHECK (events_max >= 0),
    created timestamptz NOT NULL DEFAULT now(),
    host text NOT NULL,  -- the creator's; see processes
    place text NOT NULL,
    pid integer NOT NULL,
    start bigint NOT NULL
);

CREATE TABLE lives (
    life bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNLOGGED TABLE life (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    life bigint NOT NULL
);

-- What many commits of one list change: apart from `lists`, whose row they only read.
CREATE TABLE counters (
    list bigint PRIMARY KEY REFERENCES lists ON DELETE CASCADE,
    id integer NOT NULL DEFAULT 0,
    events bigint NOT NULL DEFAULT 0,
    swept timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 20);

-- The config directories of each host.
CREATE TABLE directories (
    list bigint REFERENCES lists ON DELETE CASCADE,
    host text,
    config_dir bytea NOT NULL,
    autostart_dir bytea,
    PRIMARY KEY (list, host)
);

-- A process that uses a list. `place` tells its machine and PID namespace; `seen` is when it was
-- last heard of, by the server's clock.
CREATE TABLE processes (
    process bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    list bigint NOT NULL REFERENCES lists ON DELETE CASCADE,
    host text NOT NULL,
    place text NOT NULL,
    pid integer NOT NULL,
    start bigint NOT NULL,
    command text,
    seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    counts bigint[]  -- what it counted by then (counts.py)
) WITH (fillfactor = 50);

-- A connection, and the thread or task that uses it now. `done`: the number of its last commit.
-- `over`: since when it is known to have ended (`sweep`).
CREATE TABLE sessions (
    session bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    process bigint NOT NULL REFERENCES processes ON DELETE CASCADE,
    backend integer NOT NULL,
    tid integer NOT NULL,
    start bigint NOT NULL,
    done bigint NOT NULL DEFAULT 0,
    list_since timestamptz,
    over timestamptz
) WITH (fillfactor = 50);
CREATE INDEX ON sessions (process);

-- Each lock and unlock of a domain writes its row: so no index has a column of the mark, the pages
-- have room for new versions of their rows (HOT), and large values are kept elsewhere.
CREATE TABLE domains (
    record bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    list bigint NOT NULL REFERENCES lists ON DELETE CASCADE,
    uuid uuid NOT NULL,
    id integer NOT NULL DEFAULT -1,
    reason integer NOT NULL DEFAULT 0,
    -- Counts commits. Whoever commits names the one that he read.
    version bigint NOT NULL DEFAULT 1,
    -- The version in which a definition last changed.
    defined bigint NOT NULL DEFAULT 1,
    started bigint NOT NULL DEFAULT 0,
    token bigint NOT NULL DEFAULT 0,
    state smallint NOT NULL,
    persistent boolean NOT NULL,
    autostart boolean NOT NULL DEFAULT false,
    name text NOT NULL,
    -- Who holds its lock, or died holding it: sessions.
    owner bigint,
    since timestamptz,
    died bigint,
    told bigint,  -- of whose death there is an event
    pid integer,
    host text,
    -- The driver's own, and what is under way (rules.work): MessagePack.
    data bytea,
    work bytea,
    CONSTRAINT domains_uuid UNIQUE (list, uuid),
    CONSTRAINT domains_name UNIQUE (list, name)
) WITH (fillfactor = 50, toast_tuple_target = 1024);
CREATE UNIQUE INDEX domains_id ON domains (list, id) WHERE id <> -1;
CREATE INDEX domains_host ON domains (list, host) WHERE host IS NOT NULL;

-- Apart from `domains`, so that a change of state does not copy them. The XML is for whoever reads
-- the table; the typed value (MessagePack) is what this package reads.
CREATE TABLE definitions (
    record bigint PRIMARY KEY REFERENCES domains ON DELETE CASCADE,
    typed bytea NOT NULL,
    xml text NOT NULL,
    next_typed bytea,
    next_xml text
);

-- The highest token that a domain had which was removed. The next domain begins above it: it may be
-- the same one again, and whoever held it before must not have a token of its new holder's.
CREATE TABLE removed (
    list bigint PRIMARY KEY REFERENCES lists ON DELETE CASCADE,
    token bigint NOT NULL
);

CREATE TABLE mutexes (
    mutex bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    list bigint NOT NULL REFERENCES lists ON DELETE CASCADE,
    name text NOT NULL,
    owner bigint,
    died bigint,
    since timestamptz,
    UNIQUE (list, name)
) WITH (fillfactor = 40);

-- A commit enters its events without a number: if it counted them itself, all commits of a list
-- would wait for each other's disk. Whoever reads numbers those that are there (`publish`).
-- `list` is no foreign key: it would lock the row of the list for each event. Whoever removes a list
-- removes its events after it.
CREATE TABLE events (
    place bigint GENERATED ALWAYS AS IDENTITY,
    list bigint NOT NULL,
    number bigint,
    at timestamptz NOT NULL,
    type smallint NOT NULL,
    detail integer NOT NULL,
    uuid uuid NOT NULL,
    name text NOT NULL,
    id integer NOT NULL,
    who bigint  -- who died: a session
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX events_number ON events (list, number) WHERE number IS NOT NULL;
CREATE INDEX events_new ON events (list, place) WHERE number IS NULL;

-- --- keys of advisory locks ---

CREATE FUNCTION lock_key(_kind integer, _number bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ((23808 + _kind)::bigint << 48) | _number;

-- Kinds: 1 domain, 2 list, 3 mutex, 4 gate, 5 listeners, 6 session, 7 process.

-- --- waiting ---

-- Take an advisory lock. _wait: milliseconds, 0 tries, -1 waits for ever. False if it was not free
-- and is not waited for; when the time is up, an error (lock_not_available).
CREATE FUNCTION take(_key bigint, _wait integer) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    IF pg_try_advisory_lock(_key) THEN
        RETURN true;
    ELSIF _wait = 0 THEN
        RETURN false;
    END IF;
    PERFORM set_config('lock_timeout', greatest(_wait, 0)::text, true);
    BEGIN
        PERFORM pg_advisory_lock(_key);
    EXCEPTION WHEN lock_not_available OR deadlock_detected OR query_canceled THEN
        -- It may have been granted in that instant, and an error does not undo that.
        PERFORM pg_advisory_unlock(_key) FROM pg_locks
            WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted AND objsubid = 1
                AND (classid::bigint << 32 | objid::bigint) = _key;
        RAISE;
    END;
    PERFORM set_config('lock_timeout', '0', true);
    RETURN true;
END $$;

-- Let go of a lock of the session's when this transaction has ended. Given up at once, it would wake
-- the next one, only to wait for the transaction, and perhaps for a standby that does not answer.
-- False: it was not the session's. (To try does not wait for whoever has it then.)
CREATE FUNCTION let_go(_key bigint) RETURNS boolean
LANGUAGE sql
RETURN CASE WHEN pg_try_advisory_xact_lock(_key) IS NOT NULL THEN pg_advisory_unlock(_key) END;

-- --- telling those who wait ---

-- Tell of a commit, if any process listens to this list. NOTIFY makes all commits of a database
-- wait for each other, so nobody pays for it unless somebody sleeps.
--
-- A listener first listens, then takes lock 5 (shared), then the gate (4, exclusive, for a moment),
-- then reads. Whoever commits passes the gate (shared, until his transaction ends) before he looks
-- at lock 5. So either he sees the listener, or the listener reads what he committed.
CREATE FUNCTION tell(_list bigint, _text text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _done text;
BEGIN
    _done := pg_advisory_xact_lock_shared(lock_key(4, _list))::text;
    IF pg_try_advisory_lock(lock_key(5, _list)) THEN
        _done := pg_advisory_unlock(lock_key(5, _list));
    ELSE
        PERFORM pg_notify('shmdomains_' || _list, _text);
    END IF;
END $$;

-- Number the events that are there and have no number; returns that of the last one. Numbers have
-- no gaps. What happened after another commit had ended has a higher place, and it is not there
-- without the other: so the order is that of commits wherever they can be told apart.
CREATE FUNCTION publish(_list bigint, _max integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _last bigint;
    _count bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM events WHERE list = _list AND number IS NULL) THEN
        RETURN (SELECT events FROM counters WHERE list = _list);
    END IF;
    SELECT events INTO _last FROM counters WHERE list = _list FOR UPDATE;
    UPDATE events SET number = new.number
        FROM (
            SELECT ctid AS at, _last + row_number() OVER (ORDER BY place) AS number
            FROM events WHERE list = _list AND number IS NULL
        ) AS new
        WHERE events.ctid = new.at;
    GET DIAGNOSTICS _count = ROW_COUNT;
    UPDATE counters SET events = events + _count WHERE list = _list;
    IF (_last + _count) / 256 <> _last / 256 THEN
        DELETE FROM events WHERE list = _list AND number <= _last + _count - _max;
    END IF;
    RETURN _last + _count;
END $$;

-- Enter events: [[type, detail, id, name], ...].
CREATE FUNCTION happened(_list bigint, _max integer, _uuid uuid, _news jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _one jsonb;
    _place bigint;
BEGIN
    FOR at IN 0 .. jsonb_array_length(_news) - 1 LOOP
        _one := _news->at;
        INSERT INTO events (list, at, type, detail, uuid, name, id)
            VALUES (_list, clock_timestamp(), (_one->>0)::smallint, (_one->>1)::integer, _uuid,
                    _one->>3, (_one->>2)::integer)
            RETURNING place INTO _place;
    END LOOP;
    IF _place % 1024 = 0 THEN  -- perhaps nobody reads
        PERFORM publish(_list, _max);
    END IF;
END $$;

-- --- sessions ---

-- Number a new life of the server, if this is one. No other role may write these tables: tokens of
-- all lists depend on them.
CREATE FUNCTION begin_life() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = shmdomains, pg_catalog, pg_temp AS $$
DECLARE
    _life bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM life) THEN
        INSERT INTO lives DEFAULT VALUES RETURNING life INTO _life;
        INSERT INTO life (life) VALUES (_life) ON CONFLICT DO NOTHING;
    END IF;
END $$;

CREATE FUNCTION enter_session(
    _process bigint, _tid integer, _start bigint, OUT _session bigint, OUT _life bigint
)
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM life) THEN
        PERFORM begin_life();
    ELSE  -- a commit takes the row of its session to the disk
        PERFORM set_config('synchronous_commit', 'off', true);
    END IF;
    INSERT INTO sessions (process, backend, tid, start)
        VALUES (_process, pg_backend_pid(), _tid, _start)
        RETURNING session INTO _session;
    PERFORM pg_advisory_lock(lock_key(6, _session));
    PERFORM pg_advisory_lock_shared(lock_key(7, _process));
    _life := (SELECT life << 40 FROM life);
END $$;

-- Remove what sessions and processes left that are over: at most so many rows, and only those that
-- nobody can ask for any more. A session's receipt is asked for within minutes of its end, so its row
-- stays for a day after it was found ended; and as long as it says who died with a lock. A process
-- has lock 7 while it has a session, and is heard of while it waits or has locks.
CREATE FUNCTION sweep(_list bigint, _most integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _there bigint[];
    _over bigint[];
    _named bigint[];
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    -- A session that this statement's snapshot has was there with its lock. So first the rows, then
    -- the locks.
    SELECT array_agg(session) INTO _over FROM (
        SELECT session FROM sessions JOIN processes USING (process)
        WHERE list = _list AND over IS NULL ORDER BY session LIMIT _most
    ) AS few;
    SELECT array_agg(((classid::bigint & 65535) << 32) | objid::bigint) INTO _there
        FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint >> 16) - 23808 = 6
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    UPDATE sessions SET over = clock_timestamp()
        WHERE session = ANY (_over) AND session <> ALL (coalesce(_there, '{}'));

    SELECT array_agg(session) INTO _over FROM (
        SELECT session FROM sessions JOIN processes USING (process)
        WHERE list = _list AND over < clock_timestamp() - interval '1 day' LIMIT _most
    ) AS few;
    IF _over IS NOT NULL THEN
        SELECT array_agg(session) INTO _named FROM (
            SELECT unnest(ARRAY[owner, died, told]) AS session FROM domains
                WHERE list = _list AND (owner = ANY (_over) OR died = ANY (_over))
            UNION ALL
            SELECT unnest(ARRAY[owner, died]) FROM mutexes WHERE list = _list
            UNION ALL
            SELECT who FROM events WHERE list = _list AND who IS NOT NULL
        ) AS all_named WHERE session IS NOT NULL;
        DELETE FROM sessions
            WHERE session = ANY (_over) AND session <> ALL (coalesce(_named, '{}'));
    END IF;

    SELECT array_agg(process) INTO _over FROM (
        SELECT process FROM processes p
        WHERE list = _list AND seen < clock_timestamp() - interval '1 day'
        AND NOT EXISTS (SELECT FROM sessions s WHERE s.process = p.process) LIMIT _most
    ) AS few;
    SELECT array_agg(((classid::bigint & 65535) << 32) | objid::bigint) INTO _there
        FROM pg_locks
        WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint >> 16) - 23808 = 7
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
    DELETE FROM processes p
        WHERE process = ANY (_over) AND process <> ALL (coalesce(_there, '{}'))
        AND NOT EXISTS (SELECT FROM sessions s WHERE s.process = p.process);
END $$;

-- --- the list lock ---

CREATE FUNCTION lock_list(
    _list bigint, _me bigint, _wait integer, OUT _waited boolean, OUT _got boolean
)
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    _got := true;
    _waited := false;
    IF NOT pg_try_advisory_lock(lock_key(2, _list)) THEN
        _waited := _wait <> 0;
        _got := take(lock_key(2, _list), _wait);
    END IF;
    IF NOT _got THEN
        RETURN;
    END IF;
    UPDATE sessions SET list_since = clock_timestamp()
        WHERE session = _me AND EXISTS (SELECT FROM lists WHERE list = _list);
    IF NOT FOUND AND EXISTS (SELECT FROM sessions WHERE session = _me) THEN
        PERFORM pg_advisory_unlock(lock_key(2, _list));
        RAISE EXCEPTION 'permission denied for list %', _list USING ERRCODE = '42501';
    END IF;
END $$;

CREATE FUNCTION unlock_list(_list bigint) RETURNS boolean
LANGUAGE sql
RETURN pg_advisory_unlock(lock_key(2, _list));

-- --- a domain's lock ---

-- In the order in which it is decoded (records.py): what is never null has its place.
CREATE TYPE locked AS (
    waited boolean,
    outcome smallint,  -- 0: there is no such domain; 1: locked; 2: not free
    token bigint,
    record bigint,
    uuid uuid,
    id integer,
    reason integer,
    version bigint,
    defined bigint,
    started bigint,
    state smallint,
    persistent boolean,
    autostart boolean,
    name text,
    pid integer,
    host text,
    data bytea,
    work bytea,
    died bigint
);

-- The event of a death, once. 100 is EventType.HOLDER_DIED.
CREATE FUNCTION holder_died(_list bigint, _found locked) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE domains SET told = _found.died
        WHERE record = _found.record AND told IS DISTINCT FROM _found.died;
    IF NOT FOUND OR (SELECT events_max = 0 FROM lists WHERE list = _list) THEN
        RETURN;
    END IF;
    INSERT INTO events (list, at, type, detail, uuid, name, id, who)
        VALUES (_list, clock_timestamp(), 100, 0, _found.uuid, _found.name, _found.id,
                _found.died);
    PERFORM tell(_list, _found.record::text);
END $$;

-- Find a domain by one key and lock it; the others are null. _guess: the record that had this key when
-- the caller saw it last; if it is not free it is not waited for, as it may be another domain. _life:
-- where the tokens of the session's life begin. _lost: sessions of the caller's that ended when they
-- asked for this lock. What they got nobody used, so they did not die with it.
CREATE FUNCTION lock_domain(
    _list bigint, _me bigint, _life bigint, _guess bigint, _record bigint, _uuid uuid, _name text,
    _id integer, _lost bigint[], _wait integer
) RETURNS locked
LANGUAGE plpgsql AS $$
DECLARE
    _found locked;
    _key bigint;
    _at bigint;
    _waited boolean := false;
    _off text;
BEGIN
    _off := set_config('synchronous_commit', 'off', true);
    LOOP
        IF _guess IS NOT NULL THEN
            _at := _guess;
        ELSIF _record IS NOT NULL THEN
            _at := _record;
        ELSIF _name IS NOT NULL THEN
            SELECT record INTO _at FROM domains WHERE list = _list AND name = _name;
        ELSIF _uuid IS NOT NULL THEN
            SELECT record INTO _at FROM domains WHERE list = _list AND uuid = _uuid;
        ELSE
            SELECT record INTO _at FROM domains WHERE list = _list AND id = _id AND id <> -1;
        END IF;
        IF _at IS NULL THEN
            _found.waited := _waited;
            _found.outcome := 0;
            RETURN _found;
        END IF;
        _key := lock_key(1, _at);
        IF NOT pg_try_advisory_lock(_key) THEN
            IF _guess IS NOT NULL THEN
                _guess := NULL;
                CONTINUE;
            END IF;
            _waited := _wait <> 0;
            IF NOT take(_key, _wait) THEN
                _found.waited := _waited;
                _found.outcome := 2;
                _found.record := _at;
                RETURN _found;
            END IF;
        END IF;
        -- `owner` is still there if the last holder did not let go.
        UPDATE domains SET
            died = CASE WHEN owner = ANY (_lost) THEN died ELSE coalesce(owner, died) END,
            owner = _me, since = clock_timestamp(), token = greatest(token + 1, _life)
            WHERE record = _at AND list = _list
            AND (_record IS NOT NULL OR name = _name OR uuid = _uuid OR id = _id)
            RETURNING _waited, 1, token, record, uuid, id, reason, version, defined, started, state,
                      persistent, autostart, name, pid, host, data, work, died
            INTO _found;
        IF FOUND THEN
            IF _found.died IS NOT NULL THEN
                PERFORM holder_died(_list, _found);
            END IF;
            RETURN _found;
        END IF;
        -- It was removed, or has another key, since it was looked up.
        PERFORM pg_advisory_unlock(_key);
        IF _record IS NOT NULL THEN
            _found.waited := _waited;
            _found.outcome := 0;
            RETURN _found;
        END IF;
        _guess := NULL;
    END LOOP;
END $$;

-- _seen: the holder was told of a death, so the next one is not. Whoever does not hold it changes
-- nothing: the mark is another one's.
CREATE FUNCTION unlock_domain(_record bigint, _me bigint, _seen boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    _off text;
BEGIN
    _off := set_config('synchronous_commit', 'off', true);
    UPDATE domains SET owner = NULL, died = CASE WHEN _seen THEN NULL ELSE died END
        WHERE record = _record AND owner = _me;
    RETURN let_go(lock_key(1, _record));
END $$;

-- --- commits ---

-- The rest of each commit: its receipt, its events, whom to tell; _unlock: of which lock to let go.
CREATE FUNCTION committed(
    _list bigint, _me bigint, _number bigint, _record bigint, _uuid uuid, _max integer, _news jsonb,
    _unlock boolean
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _done text;
BEGIN
    UPDATE sessions SET done = _number WHERE session = _me;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the session has no row' USING ERRCODE = '08003';
    END IF;
    IF _news IS NOT NULL AND _max > 0 THEN
        _done := happened(_list, _max, _uuid, _news)::text;
    END IF;
    _done := tell(_list, _record::text)::text;
    IF _unlock THEN
        _done := let_go(lock_key(1, _record));
    END IF;
END $$;

-- Judge and apply the changes of a domain's holder. Returns the new version, or null if the holder
-- read another one than is there, or is not the one whose mark is there: then nothing is done.

-- What drivers change again and again.
CREATE FUNCTION commit_state(
    _list bigint, _me bigint, _number bigint, _record bigint, _version bigint,
    _state smallint, _reason integer, _set_data boolean, _data bytea,
    _max integer, _news jsonb, _unlock boolean
) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _uuid uuid;
    _done text;
BEGIN
    UPDATE domains SET
        state = _state, reason = _reason, version = version + 1,
        data = CASE WHEN _set_data THEN _data ELSE data END,
        owner = CASE WHEN NOT _unlock THEN owner END,
        died = CASE WHEN NOT _unlock THEN died END
        WHERE record = _record AND list = _list AND version = _version AND owner = _me
        RETURNING uuid INTO _uuid;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    _done := committed(_list, _me, _number, _record, _uuid, _max, _news, _unlock)::text;
    RETURN _version + 1;
END $$;

-- All of it: the scalars are all given, changed or not; of definitions, data and work a flag says
-- whether they change.
CREATE FUNCTION commit_domain(
    _list bigint, _me bigint, _number bigint, _record bigint, _version bigint,
    _name text, _id integer, _state smallint, _reason integer, _persistent boolean,
    _autostart boolean, _pid integer, _started bigint, _host text,
    _set_data boolean, _data bytea, _set_work boolean, _work bytea,
    _set_typed boolean, _typed bytea, _xml text,
    _set_next boolean, _next_typed bytea, _next_xml text,
    _max integer, _news jsonb, _unlock boolean
) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _uuid uuid;
    _done text;
BEGIN
    UPDATE domains SET
        name = _name, id = _id, state = _state, reason = _reason, persistent = _persistent,
        autostart = _autostart, pid = _pid, started = _started, host = _host,
        version = version + 1,
        defined = CASE WHEN _set_typed OR _set_next THEN version + 1 ELSE defined END,
        data = CASE WHEN _set_data THEN _data ELSE data END,
        work = CASE WHEN _set_work THEN _work ELSE work END,
        owner = CASE WHEN NOT _unlock THEN owner END,
        died = CASE WHEN NOT _unlock THEN died END
        WHERE record = _record AND list = _list AND version = _version AND owner = _me
        RETURNING uuid INTO _uuid;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    IF _set_typed THEN
        UPDATE definitions SET typed = _typed, xml = _xml WHERE record = _record;
    END IF;
    IF _set_next THEN
        UPDATE definitions SET next_typed = _next_typed, next_xml = _next_xml
            WHERE record = _record;
    END IF;
    _done := committed(_list, _me, _number, _record, _uuid, _max, _news, _unlock)::text;
    RETURN _version + 1;
END $$;

-- A new domain, locked.
CREATE FUNCTION insert_domain(
    _list bigint, _me bigint, _number bigint, _life bigint, _uuid uuid, _name text, _state smallint,
    _persistent boolean, _typed bytea, _xml text, _work bytea, _max integer, _news jsonb,
    OUT _record bigint, OUT _token bigint
)
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO domains (list, uuid, name, state, persistent, work, owner, since, token)
        VALUES (_list, _uuid, _name, _state, _persistent, _work, _me, clock_timestamp(),
                greatest(_life, (SELECT token + 1 FROM removed WHERE list = _list)))
        RETURNING record, token INTO _record, _token;
    INSERT INTO definitions (record, typed, xml) VALUES (_record, _typed, _xml);
    PERFORM committed(_list, _me, _number, _record, _uuid, _max, _news, false);
    PERFORM pg_advisory_lock(lock_key(1, _record));  -- nobody else can know it
END $$;

CREATE FUNCTION remove_domain(
    _list bigint, _me bigint, _number bigint, _record bigint, _version bigint, _max integer,
    _news jsonb
) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    _uuid uuid;
    _token bigint;
BEGIN
    DELETE FROM domains
        WHERE record = _record AND list = _list AND version = _version AND owner = _me
        RETURNING uuid, token INTO _uuid, _token;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO removed AS r (list, token) VALUES (_list, _token)
        ON CONFLICT (list) DO UPDATE SET token = greatest(r.token, excluded.token);
    PERFORM committed(_list, _me, _number, _record, _uuid, _max, _news, true);
    RETURN true;
END $$;

CREATE FUNCTION next_id(_list bigint) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    _next integer;
BEGIN
    -- The commit that uses the id flushes this one with it.
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE counters SET id = id + 1 WHERE list = _list AND id < 2147483647
        RETURNING id INTO _next;
    RETURN _next;
END $$;

-- --- named locks ---

CREATE TYPE locked_mutex AS (waited boolean, outcome smallint, died bigint);

CREATE FUNCTION lock_mutex(
    _list bigint, _me bigint, _mutex bigint, _lost bigint[], _wait integer
) RETURNS locked_mutex
LANGUAGE plpgsql AS $$
DECLARE
    _found locked_mutex;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    _found.waited := false;
    IF NOT pg_try_advisory_lock(lock_key(3, _mutex)) THEN
        _found.waited := _wait <> 0;
        IF NOT take(lock_key(3, _mutex), _wait) THEN
            _found.outcome := 2;
            RETURN _found;
        END IF;
    END IF;
    UPDATE mutexes
        SET died = CASE WHEN owner = ANY (_lost) THEN died ELSE coalesce(owner, died) END,
            owner = _me, since = clock_timestamp()
        WHERE mutex = _mutex AND list = _list
        RETURNING died INTO _found.died;
    _found.outcome := 1;
    IF NOT FOUND THEN
        PERFORM pg_advisory_unlock(lock_key(3, _mutex));
        _found.outcome := 0;
    END IF;
    RETURN _found;
END $$;

CREATE FUNCTION unlock_mutex(_mutex bigint, _me bigint, _seen boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE mutexes SET owner = NULL, died = CASE WHEN _seen THEN NULL ELSE died END
        WHERE mutex = _mutex AND owner = _me;
    RETURN let_go(lock_key(3, _mutex));
END $$;

-- --- who may use which list ---

-- Roles that may use some lists only (`schema.install` enters them). The owner of these tables
-- passes by all of this; a role that may use all lists has a policy of its own, which is true.
CREATE TABLE users (
    role name,
    list bigint REFERENCES lists ON DELETE CASCADE,
    oid oid NOT NULL,  -- a role that was dropped leaves its row to no other of its name
    PRIMARY KEY (role, list)
);
ALTER TABLE users ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON users USING (role = current_user);

-- Rows without a list belong to a row that has one. The policy of its table holds in the subquery.
DO $$
DECLARE
    _table text;
    _own CONSTANT text := 'list = ANY (ARRAY(SELECT list FROM users WHERE role = current_user))';
BEGIN
    FOREACH _table IN ARRAY ARRAY[
        'lists', 'counters', 'directories', 'processes', 'domains', 'removed', 'mutexes', 'events'
    ] LOOP
        EXECUTE format('CREATE POLICY own ON %I USING (%s)', _table, _own);
    END LOOP;
    CREATE POLICY own ON sessions
        USING (EXISTS (SELECT FROM processes p WHERE p.process = sessions.process));
    CREATE POLICY own ON definitions
        USING (EXISTS (SELECT FROM domains d WHERE d.record = definitions.record));
    FOREACH _table IN ARRAY ARRAY[
        'lists', 'counters', 'directories', 'processes', 'domains', 'removed', 'mutexes', 'events',
        'sessions', 'definitions'
    ] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', _table);
    END LOOP;
END $$;
