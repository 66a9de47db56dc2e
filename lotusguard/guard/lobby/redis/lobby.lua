-- SPDX-License-Identifier: Apache-2.0
-- What happens to lobby entries, by the server's clock. The table and the constants come from the rules in Python.
-- KEYS[1]: begins the names of all keys. ARGV[1]: JSON {guard, longest_wait, operations = [[name, arguments…]…]}.
-- The answer is JSON {now, version, born, changes, results}. The same changes are published for all guards.
-- Keys: a hash for each room (user → entry); "due" and "spare" (entries by when time does something to them, and by the
-- order in which they are dropped); "waiting" (how many wait in each room, of each user, of each server, and in all);
-- "rooms"; "version" (of the last change); "born" (the first version of this data set).

local request = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local BASE = KEYS[1]
local DUE, SPARE, WAITING, ROOMS = BASE .. ':due', BASE .. ':spare', BASE .. ':waiting', BASE .. ':rooms'
local VERSION, BORN = BASE .. ':version', BASE .. ':born'
local changes, speaks = {}, false

local version = tonumber(redis.call('GET', VERSION))
if not version then  -- versions grow with time, so those of a data set that was lost are lower
  version = math.floor((now - 1700000000) * 1000)
  redis.call('MSET', VERSION, string.format('%.0f', version), BORN, string.format('%.0f', version))
end

local function room_key(room) return BASE .. ':room:' .. room end
local function member(room, user) return cjson.encode({room, user}) end

local function tell(room, entry, event, before, after)
  version = version + 1
  entry.version = version
  local copy = {}
  for name, value in pairs(entry) do copy[name] = value end
  changes[#changes + 1] = {room, copy, event or false, before or false, after or false}
end

local function of_user(user) return 'user ' .. user end
local function of_server(user) return 'server ' .. (user:match(':(.*)') or '') end

local function count(room, user, before, after)
  local difference = (after == 'waiting' and 1 or 0) - (before == 'waiting' and 1 or 0)
  if difference == 0 then return end
  for _, counted in ipairs({'', room, of_user(user), of_server(user)}) do
    if redis.call('HINCRBY', WAITING, counted, difference) <= 0 then redis.call('HDEL', WAITING, counted) end
  end
  -- older guards count neither users nor servers: the counts are right again once nobody waits
  if redis.call('HEXISTS', WAITING, '') == 0 then redis.call('DEL', WAITING) end
end

local function waiting(counted) return tonumber(redis.call('HGET', WAITING, counted)) or 0 end

local function is_full(room, user, is_local)
  if waiting(room) >= WAITING_PER_ROOM or waiting(of_user(user)) >= WAITING_PER_USER then return true end
  if is_local then return waiting('') >= WAITING_IN_ALL end
  return waiting(of_server(user)) >= WAITING_FOR_OTHER_SERVERS - waiting('')
end

local function store(room, entry)
  local key, name, due = room_key(room), member(room, entry.user), entry.expires
  redis.call('HSET', key, entry.user, cjson.encode(entry))
  redis.call('EXPIRE', key, KEPT)
  redis.call('ZADD', ROOMS, 0, room)
  if entry.state == 'waiting' then
    due = math.min(due, entry.began + request.longest_wait)
    redis.call('ZREM', SPARE, name)
  else
    redis.call('ZADD', SPARE, string.format('%.4f', TABLE[entry.state].rank * 1e10 + entry.expires), name)
  end
  redis.call('ZADD', DUE, string.format('%.4f', due), name)
end

local function keep(room, entry, event, before)
  tell(room, entry, event, before, entry.state)
  store(room, entry)
  count(room, entry.user, before, entry.state)
end

local function discard(room, entry, event)
  local name = member(room, entry.user)
  tell(room, entry, event, entry.state, nil)
  redis.call('HDEL', room_key(room), entry.user)
  if redis.call('EXISTS', room_key(room)) == 0 then redis.call('ZREM', ROOMS, room) end
  redis.call('ZREM', DUE, name)
  redis.call('ZREM', SPARE, name)
  count(room, entry.user, entry.state, nil)
end

local function apply(room, entry, event)
  local before, after = entry.state, TABLE[entry.state].moves[event]
  if after == nil then return false end
  if after == false then
    discard(room, entry, event)
    return true
  end
  entry.state = after
  if after ~= before then entry.began = now end
  entry.expires = now + TABLE[after].lifetime
  if after == 'waiting' and before == 'waiting' then store(room, entry) else keep(room, entry, event, before) end
  return true
end

local function get(room, user)
  local stored = redis.call('HGET', room_key(room), user)
  return stored and cjson.decode(stored) or nil
end

local function due(entry)
  if entry.state == 'waiting' and now - entry.began >= request.longest_wait then return 'time_out' end
  return now >= entry.expires and 'expire' or nil
end

local function find(room, user)
  local entry = get(room, user)
  while entry and due(entry) do
    apply(room, entry, due(entry))
    entry = get(room, user)
  end
  return entry
end

local function drop_some()
  for _, name in ipairs(redis.call('ZRANGE', SPARE, 0, DROPPED_AT_ONCE - 1)) do
    local room, user = unpack(cjson.decode(name))
    local entry = get(room, user)
    if entry then discard(room, entry, 'expire') else redis.call('ZREM', SPARE, name) end
  end
end

local Operations = {}

function Operations.happen(event, room, user, id, is_local)
  local entry, begins = find(room, user), BEGINS[event]
  if entry then return {apply(room, entry, event), get(room, user) or false, false} end
  if not begins then return {false, false, false} end
  if begins == 'waiting' and is_full(room, user, is_local) then return {false, false, true} end
  if redis.call('ZCARD', DUE) >= ENTRIES_KEPT then drop_some() end
  entry = {id = id, user = user, state = begins, began = now, expires = now + TABLE[begins].lifetime, notice = ''}
  keep(room, entry, event, nil)
  return {true, entry, false}
end

function Operations.happen_in_room(event, room)
  for _, user in ipairs(redis.call('HKEYS', room_key(room))) do
    local entry = get(room, user)
    if entry then apply(room, entry, event) end
  end
  return true
end

function Operations.read(room, user) return find(room, user) or false end

function Operations.set_notice(room, user, id, notice)
  local entry = find(room, user)
  if not entry or entry.id ~= id then return false end
  entry.notice = notice
  keep(room, entry, nil, entry.state)
  return true
end

-- A guard holds requests of these users.
function Operations.hold(held)
  for _, who in ipairs(held) do
    local entry = find(who[1], who[2])
    if entry and entry.state == 'waiting' then
      entry.expires = now + HELD_LEASE
      store(who[1], entry)
    end
  end
  return true
end

-- A guard holds no request of this user any more. Another one that does says so within a second.
function Operations.let_go(room, user)
  local entry = find(room, user)
  if entry and entry.state == 'waiting' then
    entry.expires = now + TABLE.waiting.lifetime
    store(room, entry)
  end
  return true
end

-- An entry as a guard knows it that was alone, or whose entries this server has lost. A decision holds against an entry
-- that waits, and the later of two decisions against the earlier one.
function Operations.restore(room, given)
  local entry = find(room, given.user)
  if given.expires <= now or redis.call('ZCARD', DUE) >= ENTRIES_KEPT then return false end
  if entry and (given.state == 'waiting' or (entry.state ~= 'waiting' and entry.began >= given.began)) then
    return false
  end
  keep(room, given, nil, entry and entry.state)
  return true
end

function Operations.pass_time()
  speaks = true  -- every guard hears this, or finds out that its subscription hears nothing
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', now, 'LIMIT', 0, DROPPED_AT_ONCE)) do
    local room, user = unpack(cjson.decode(name))
    if not find(room, user) then
      redis.call('ZREM', DUE, name)
      redis.call('ZREM', SPARE, name)
    end
  end
  for _, key in ipairs({DUE, SPARE, WAITING, ROOMS}) do redis.call('EXPIRE', key, KEPT) end
  return true
end

-- All entries, some rooms at a time. The answer names the last of these rooms, '' after the last page.
function Operations.page(after)
  local from = after == '' and '-' or '(' .. after
  local rooms, found, last = redis.call('ZRANGEBYLEX', ROOMS, from, '+', 'LIMIT', 0, ROOMS_AT_ONCE), {}, ''
  for _, room in ipairs(rooms) do
    for _, entry in ipairs(redis.call('HVALS', room_key(room))) do found[#found + 1] = {room, entry} end
    last = room
  end
  return {last, found}
end

local results = {}
for place, operation in ipairs(request.operations) do
  results[place] = Operations[operation[1]](unpack(operation, 2))
end
if #changes > 0 then redis.call('SET', VERSION, string.format('%.0f', version)) end
if #changes > 0 or speaks then redis.call('PUBLISH', CHANNEL, cjson.encode({request.guard, version, changes})) end
return cjson.encode({now, version, redis.call('GET', BORN), changes, results})
