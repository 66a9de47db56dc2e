-- SPDX-License-Identifier: Apache-2.0
-- What Redis keeps of one room. A step reads what it needs when it needs it, and writes what it changed at its end: if it
-- fails before, nothing was written.
--
-- KEYS[1] is a hash. Its field "ROOM" is what belongs to the room as a whole. The first letter of any other says what it
-- is:
--   p + hold ID             a hold of a request in flight
--   s + alias + sid         a hold of somebody in the call
--   r + alias + identity    a hold that is reserved
--   i + hold ID             the field of a hold that was issued
--   n + alias + identity    the sessions of an identity
--   u + user                what a user holds
--   c + user                a user's time to arrive
--   o + number              who became an occupant, or ceased to be one
-- The other keys are sorted sets: they keep the fields of some holds in an order.

local COLUMNS = {
  hold = {'state', 'id', 'user', 'alias', 'identity', 'sid', 'began', 'expires', 'place', 'lease', 'device'},
  user = {'holds', 'takes_seat', 'full', 'owns_seat', 'removes', 'occupies', 'exempt', 'reserved'},
  time_to_arrive = {'expires', 'asked'},
}
local ROWS = {p = COLUMNS.hold, s = COLUMNS.hold, r = COLUMNS.hold, u = COLUMNS.user, c = COLUMNS.time_to_arrive}
local AT_ONCE = 2000  -- arguments of one command
local HASH = KEYS[1]

local Store = {}
local room                       -- the field "ROOM"
local is_new = false             -- whether Redis has no such room: sorted sets that outlived it do not count
local texts = {}                 -- name of a field → what Redis has, false if it has none
local known, changed = {}, {}    -- name of a field → its value, false if there is none; names of those that changed
local orders = {}

local function digits(number) return string.format('%.0f', number) end

-- fields -----------------------------------------------------------------------------------------------------------

local function packed(name, value)
  local columns = ROWS[name:sub(1, 1)]
  if not columns then return cmsgpack.pack(value) end
  local row = {}
  for i = 1, #columns do row[i] = value[columns[i]] or false end
  return cmsgpack.pack(row)
end

local function unpacked(name, text)
  local value, columns = cmsgpack.unpack(text), ROWS[name:sub(1, 1)]
  if not columns then return value end
  local record = {}
  for i = 1, #columns do record[columns[i]] = value[i] or nil end
  return record
end

local function read(name)
  local value = known[name]
  if value == nil then
    local text = texts[name]
    if text == nil and not is_new then text = redis.call('HGET', HASH, name) end
    value = text and unpacked(name, text) or false
    known[name] = value
  end
  return value or nil
end

local function write(name, value)
  known[name] = value or false
  changed[name] = true
end

-- The fields that begin with a letter, as a table. A value that was changed has to be assigned again.
local function fields(letter)
  return setmetatable({}, {
    __index = function(_, key) return read(letter .. key) end,
    __newindex = function(_, key, value) write(letter .. key, value) end,
  })
end

-- Send a command with these values, in as many parts as it takes.
local function send(command, key, values)
  for first = 1, #values, AT_ONCE do
    redis.call(command, key, unpack(values, first, math.min(first + AT_ONCE - 1, #values)))
  end
end

-- Read many fields at once, because they are going to be used.
function Store.fetch(names)
  if is_new then return end
  local missing = {}
  for i = 1, #names do
    if known[names[i]] == nil and texts[names[i]] == nil then missing[#missing + 1] = names[i] end
  end
  for first = 1, #missing, AT_ONCE do
    local found = redis.call('HMGET', HASH, unpack(missing, first, math.min(first + AT_ONCE - 1, #missing)))
    for i = 1, #found do texts[missing[first + i - 1]] = found[i] end
  end
end

-- Whether there is a field.
function Store.has(name)
  if known[name] ~= nil then return known[name] ~= false end
  if texts[name] ~= nil then return texts[name] ~= false end
  return read(name) ~= nil
end

local beginnings = {}

-- Whether a field that was read has this value in its first column. Others are not looked at, which saves time if many
-- fields are asked about.
function Store.begins_with(name, value)
  if known[name] ~= nil then return known[name] and known[name][ROWS[name:sub(1, 1)][1]] == value end
  if not texts[name] then return false end
  local beginning = beginnings[value]
  if not beginning then
    local whole = packed(name, {[ROWS[name:sub(1, 1)][1]] = value})
    beginning = whole:sub(1, select(2, whole:find(value, 1, true)))
    beginnings[value] = beginning
  end
  return texts[name]:sub(1, #beginning) == beginning
end

-- The names of all fields that begin with a letter. This costs as much as the room is large.
function Store.names(letter)
  local cursor = '0'
  repeat
    local found = redis.call('HSCAN', HASH, cursor, 'MATCH', letter .. '*', 'COUNT', 100000)
    cursor = found[1]
    for i = 1, #found[2], 2 do texts[found[2][i]] = found[2][i + 1] end
  until cursor == '0'
  local names = {}
  for name, text in pairs(texts) do
    if text and known[name] == nil and name:sub(1, 1) == letter then names[#names + 1] = name end
  end
  for name, value in pairs(known) do
    if value and name:sub(1, 1) == letter then names[#names + 1] = name end
  end
  return names
end

-- Their values.
function Store.all(letter)
  local values = {}
  for place, name in ipairs(Store.names(letter)) do values[place] = read(name) end
  return values
end

-- orders -----------------------------------------------------------------------------------------------------------

local function precise(number) return string.format('%.17g', number) end

local function by_score(a, b)
  if a[2] ~= b[2] then return a[2] < b[2] end
  return a[1] < b[1]
end

-- A sorted set, and what this step has changed of it.
local function order(key)
  local it, news, old = {}, {}, nil  -- news: member → score, false if it was taken out; old: the whole set, once read

  local function stored(command, ...) return is_new and {} or redis.call(command, key, ...) end

  function it.put(member, score) news[member] = score end
  function it.drop(member) news[member] = false end

  -- [member, score]… up to a score, in their order.
  function it.up_to(most)
    local found, before = {}, stored('ZRANGEBYSCORE', '-inf', most and precise(most) or '+inf', 'WITHSCORES')
    for i = 1, #before, 2 do
      if news[before[i]] == nil then found[#found + 1] = {before[i], tonumber(before[i + 1])} end
    end
    local unchanged = #found
    for member, score in pairs(news) do
      if score and (not most or score <= most) then found[#found + 1] = {member, score} end
    end
    if #found > unchanged then table.sort(found, by_score) end
    return found
  end

  -- Read all, because the scores of many members are going to be asked for.
  function it.read()
    old = {}
    local before = stored('ZRANGE', 0, -1, 'WITHSCORES')
    for i = 1, #before, 2 do old[before[i]] = tonumber(before[i + 1]) end
  end

  function it.score(member)
    local score = news[member]
    if score ~= nil then return score or nil end
    if old or is_new then return old and old[member] end
    local before = redis.call('ZSCORE', key, member)
    return before and tonumber(before) or nil
  end

  -- The highest score.
  function it.highest()
    local highest
    for _, score in pairs(news) do
      if score and (not highest or score > highest) then highest = score end
    end
    local place, last = 0
    repeat  -- past those that were taken out
      last = stored('ZREVRANGE', place, place, 'WITHSCORES')
      place = place + 1
    until #last == 0 or news[last[1]] == nil
    if #last > 0 then highest = math.max(highest or tonumber(last[2]), tonumber(last[2])) end
    return highest
  end

  function it.write()
    local put, dropped = {}, {}
    for member, score in pairs(news) do
      if score then
        put[#put + 1] = precise(score)
        put[#put + 1] = member
      else
        dropped[#dropped + 1] = member
      end
    end
    send('ZADD', key, put)
    send('ZREM', key, dropped)
    news, old = {}, nil
  end

  orders[#orders + 1] = it
  return it
end

-- the room ---------------------------------------------------------------------------------------------------------

-- Read the room. "new" is what it is if there is none.
function Store.open(new)
  room = read('ROOM')
  if not room then room, is_new = new, true end
end

-- Write what was changed. All is deleted after so many seconds in which nothing is written.
function Store.write(seconds)
  write('ROOM', room)
  local put, dropped = {}, {}
  for name in pairs(changed) do
    if known[name] then
      put[#put + 1] = name
      put[#put + 1] = packed(name, known[name])
    else
      dropped[#dropped + 1] = name
    end
  end
  -- first what a server without memory rejects: then nothing was written
  send('HSET', HASH, put)
  send('HDEL', HASH, dropped)
  changed = {}
  if is_new then redis.call('DEL', unpack(KEYS, 2)) end
  for _, one in ipairs(orders) do one.write() end
  for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, seconds) end
end
