-- SPDX-License-Identifier: Apache-2.0
-- The seats of one Matrix room: the rules of lotusguard/rules/room_seats.py, step by step, on the table TABLE that is
-- generated from lotusguard/rules/seats.py. Tests run both side by side. Times are seconds.
--
-- A step costs the same however many people are in the room. Only what asks for all of them reads all.

local Seats = {}

-- The room as a whole, if there is none. Its numbers begin so that no earlier room with this name has had them.
function Seats.new(now, unlimited_at, epoch)
  local first = math.floor(now * 1000000)
  return {
    unlimited_at = unlimited_at, touched = now, vacated = now, epoch = epoch, listed = {},
    version = first,  -- grows with each change of what is held here, and by whom
    news = first,     -- grows with each change of who is an occupant
    owners = 0,       -- grows with each change of who owns a seat, and with each token that was issued without one
    place = 0, users = 0, states = {}, aliases = {}, in_call = {},
    total = {takes_seat = 0, full = 0, owns_seat = 0, removes = 0},
  }
end

local function expires_before(a, b)
  if a.expires ~= b.expires then return a.expires < b.expires end
  return a.place < b.place
end

-- Let everything expire that has.
-- Returns whether anything has, and whether a request in flight ended because its guard did not renew it.
function Seats.advance(now)
  local names, expired, lapsed = {}, {}, {}
  for _, found in ipairs(due.up_to(now)) do
    local name, at = found[1], found[2]
    if name:sub(1, 1) ~= 'c' then
      names[#names + 1] = name
    elseif at < now then
      write(name, nil)
      due.drop(name)
    end
  end
  for _, hold in ipairs(read_all(names)) do
    local list = hold.state == 'pending' and lapsed or expired
    list[#list + 1] = hold
  end
  table.sort(expired, expires_before)
  for _, hold in ipairs(expired) do move(hold, 'expire', hold.expires) end
  for _, hold in ipairs(in_order(lapsed)) do move(hold, 'release', now) end
  return #names > 0, #lapsed > 0
end

-- a join -----------------------------------------------------------------------------------------------------------

function Seats.take(now, hold_id, user, limit, alias, exempt, slots, lease)
  room.touched = now
  if hold_with(hold_id) then return nil end  -- asked again, because the answer was lost
  if slots and not room.aliases[alias] then
    local number = 0
    for _ in pairs(room.aliases) do number = number + 1 end
    if number >= slots then return 'too_many_slots' end
  end
  if not limit then
    room.unlimited_at = now
  elseif not exempt and room.total.takes_seat >= limit and not owns_seat(user) then
    return room.total.full >= limit and 'full' or 'seat_pending'
  end
  put_pending({id = hold_id, user = user, state = 'pending', alias = alias, identity = '', sid = '', began = now,
               expires = 0, lease = lease})
  if exempt then Seats.exempt(now, user) end
end

local function time_to_arrive(user, now, ttl)
  local chain = chains[user]
  if not chain or chain.asked + ttl < now then chain = {expires = now + ttl} end
  chain.asked = now
  chains[user] = chain
  due.put('c' .. user, now + ttl)
  return chain.expires
end

local function has_arrived(user)
  if chains[user] then
    chains[user] = nil
    due.drop('c' .. user)
  end
end

local function reserve(hold, alias, identity, now, ttl, device)
  local expires = time_to_arrive(hold.user, now, ttl)
  hold.state = TABLE[hold.state].moves[expires <= now and 'issue_late' or 'issue']
  hold.alias, hold.identity, hold.began, hold.expires, hold.lease = alias, identity, now, expires, nil
  hold.device = device
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.issue(now, hold_id, alias, identity, ttl, device)
  local hold = pending[hold_id]
  if not hold then return hold_with(hold_id) end
  take_out(hold)
  count(hold, -1)
  return reserve(hold, alias, identity_of(identity, hold_id), now, ttl, device)
end

function Seats.issue_without_seat(now, hold_id, user, alias, identity, ttl, device)
  local hold = hold_with(hold_id)
  if hold then return hold end
  identity = identity_of(identity, hold_id)
  hold = {id = hold_id, user = user, state = 'pending', alias = alias, identity = identity, sid = '', began = now,
          expires = 0, device = device}
  if owns_seat(user) then return reserve(hold, alias, identity, now, ttl, device) end
  hold.state, hold.expires = 'issued_unseated', time_to_arrive(user, now, ttl)
  put_reserved(key_of(alias, identity), hold)
  return hold
end

function Seats.release(now, hold_id)
  if not pending[hold_id] then return false end
  move(pending[hold_id], 'release', now)
  return true
end

-- the call ---------------------------------------------------------------------------------------------------------

-- Whether somebody who is in the call may have a seat there. Before the first listing nobody can tell.
local function may_sit(user, alias, limit)
  return not limit or owns_seat(user) or (room.listed[alias] ~= nil and room.total.owns_seat < limit)
end

local function arrived(alias, who, limit, now, joined_by)
  local at, key = key_of(alias, who.sid), key_of(alias, who.identity)
  if ended.score(at) then return end
  local token = reserved[key]
  if token and token.began > joined_by then token = nil end
  local hold = sessions[at]
  if hold then
    if token then move(token, 'replace', now) end
  elseif token and token.user == who.user then
    hold = token
    hold.sid = who.sid
    move(hold, 'arrive', now)
  else
    hold = {id = who.sid, user = who.user, state = may_sit(who.user, alias, limit) and 'present' or 'unseated',
            alias = alias, identity = who.identity, sid = who.sid, began = now, expires = 0}
    put_session(hold)
  end
  has_arrived(who.user)
  if hold.state == 'unseated' and may_sit(hold.user, alias, limit) then move(hold, 'seat', now) end
end

function Seats.arrive(now, alias, who, limit)
  room.touched = now
  if not limit then room.unlimited_at = now end
  if who.joined and (room.listed[alias] or who.joined) >= who.joined + OVERTAKEN_BY then return end
  arrived(alias, who, limit, now, who.joined or now)
end

-- The device that an identity of /sfu/get names in clear; '' if this is none of that user's.
local function device_named_by(identity, user)
  return identity:sub(1, #user + 1) == user .. ':' and identity:sub(#user + 2) or ''
end

-- End the holds of tokens that the device of an identity was given for the same call and did not use.
local function end_unused(user, alias, identity, left_by, now)
  local device = device_named_by(identity, user)
  if device == '' then return end
  for _, hold in ipairs(reserved_for(user)) do
    if hold.device == device and hold.alias == alias and hold.identity ~= identity and hold.sid == ''
      and hold.began <= left_by then
      move(hold, 'leave', now)
    end
  end
end

local function forget_ended(now)
  for _, found in ipairs(ended.up_to(now - ENDED_SESSIONS_KEPT)) do ended.drop(found[1]) end
end

function Seats.leave(now, alias, sid, identity, left_by, by_choice)
  room.touched = now
  local at, key = key_of(alias, sid), key_of(alias, identity)
  ended.put(at, now)
  forget_ended(now)
  local token, hold = reserved[key], sessions[at]
  local of = hold or token
  if by_choice and of then end_unused(of.user, alias, identity, left_by, now) end
  if by_choice and token and (token.began <= left_by or sid ~= '' and token.sid == sid) then move(token, 'leave', now) end
  if hold then move(hold, by_choice and 'leave' or 'vanish', now) end
end

-- Tokens that were issued while the roster was unknown get the seats that are free, first come first served.
function Seats.seat_failed_open(now, limit)
  if not room.states.issued_unseated then return end
  local tried = room.tried
  if tried and tried[1] == room.owners and tried[2] == limit then return end  -- nothing has changed for them
  for _, hold in ipairs(without_seat('r')) do
    if owns_seat(hold.user) or room.total.owns_seat < limit then move(hold, 'seat', now) end
  end
  room.tried = {room.owners, limit}
end

-- a listing --------------------------------------------------------------------------------------------------------

-- By the time they joined.
local function by_age(present)
  local sorted = {}
  for place, who in ipairs(present) do
    sorted[place] = {who = who, place = place, joined = who.joined or 0}
  end
  table.sort(sorted, function(a, b)
    if a.joined ~= b.joined then return a.joined < b.joined end
    return a.place < b.place
  end)
  return sorted
end

-- Read at once what is kept of those whom a listing shows.
local function read_present(alias, present, any_reserved)
  local names = {}
  for _, who in ipairs(present) do
    names[#names + 1] = 's' .. key_of(alias, who.sid)
    if any_reserved then names[#names + 1] = 'r' .. key_of(alias, who.identity) end
  end
  Store.fetch(names)
  ended.read()
end

-- Read at once what is kept of these users and identities.
local function read_users(alias, arrivals_or_holds)
  local names = {}
  for _, who in ipairs(arrivals_or_holds) do
    names[#names + 1] = 'u' .. who.user
    names[#names + 1] = 'c' .. who.user
    names[#names + 1] = 'n' .. key_of(alias, who.identity)
    names[#names + 1] = 'r' .. key_of(alias, who.identity)
  end
  Store.fetch(names)
end

-- Whether a listing says nothing new about a participant: they have a seat, and no unused token.
local function is_settled(alias, at, who, any_reserved)
  return Store.begins_with('s' .. at, 'present') and not ended.score(at)
    and not (any_reserved and reserved[key_of(alias, who.identity)])
end

-- Users whose time to arrive runs.
local function awaited_users()
  local names = {}
  for _, found in ipairs(due.up_to()) do
    if found[1]:sub(1, 1) == 'c' then names[found[1]:sub(2)] = true end
  end
  return names
end

local function note_listing(alias, limit, since, now)
  room.listed[alias] = since
  room.touched = now
  if not limit then room.unlimited_at = now end
end

-- End the sessions that a listing does not show.
local function end_missing(alias, there, since, now)
  local found = 0
  for at in pairs(there) do
    if Store.has('s' .. at) then found = found + 1 end
  end
  if found == (room.in_call[alias] or 0) then return end
  local names, missing = {}, {}
  for _, name in ipairs(Store.names('s')) do
    if not there[name:sub(2)] then names[#names + 1] = name end
  end
  for _, hold in ipairs(in_order(read_all(names))) do
    if hold.alias == alias and hold.began < since then missing[#missing + 1] = hold end
  end
  read_users(alias, missing)
  for _, hold in ipairs(missing) do move(hold, 'vanish', now) end
end

-- Returns whether it told nothing new, and nothing is undecided: then a listing that shows the same tells nothing either.
function Seats.apply_listing(now, alias, present, limit, since)
  local listed = room.listed[alias]
  if listed and since < listed then return false end  -- a later listing overtook it
  note_listing(alias, limit, since, now)
  local there, distinct, unsettled = {}, 0, {}
  local any_reserved, awaited = how_many(RESERVED) > 0, awaited_users()
  read_present(alias, present, any_reserved)
  for _, who in ipairs(present) do
    local at = key_of(alias, who.sid)
    if not there[at] then distinct = distinct + 1 end
    there[at] = true
    if not is_settled(alias, at, who, any_reserved) then
      unsettled[#unsettled + 1] = who
    elseif awaited[who.user] then
      has_arrived(who.user)
    end
  end
  read_users(alias, unsettled)
  for _, entry in ipairs(by_age(unsettled)) do
    local who = entry.who
    local at = key_of(alias, who.sid)
    local ended_at = ended.score(at)
    if ended_at and ended_at < since then ended.drop(at) end  -- the SFU was asked after that event, and says it is there
    local before = not listed and (not who.joined or who.joined <= room.unlimited_at)
    arrived(alias, who, not before and limit or nil, now, since)
  end
  end_missing(alias, there, since, now)
  for _, hold in ipairs(to_confirm(since)) do
    if hold.alias == alias or hold.alias == '' then move(hold, 'confirm', now) end
  end
  if limit then Seats.seat_failed_open(now, limit) end
  forget_ended(now)
  local undecided = how_many({'issued_expired', 'left', 'unseated', 'issued_unseated'}) > 0
  return #unsettled == 0 and not undecided and (room.in_call[alias] or 0) == distinct
end

-- Whether a listing tells nothing new if it shows the same as one that told nothing new when the holds had a version.
function Seats.is_same(alias, since, version)
  local listed = room.listed[alias]
  return room.version == version and listed ~= nil and since >= listed
end

-- A listing that tells nothing new.
function Seats.listed_again(now, alias, limit, since) note_listing(alias, limit, since, now) end

function Seats.overflow(now, limit)
  local over = {}
  if not room.states.unseated then return over end
  for _, hold in ipairs(without_seat('s')) do
    if may_sit(hold.user, hold.alias, limit) then
      move(hold, 'seat', now)
    elseif room.total.removes >= limit and room.listed[hold.alias] then
      over[#over + 1] = hold
    end
  end
  return over
end

function Seats.seat_everybody(now)
  if not room.states.unseated then return end
  for _, hold in ipairs(without_seat('s')) do move(hold, 'seat', now) end
end

-- who holds what ---------------------------------------------------------------------------------------------------

-- Returns whether this is new: somebody who waits may find a seat.
function Seats.exempt(now, name)
  local user = users[name]
  if not user or user.exempt then return false end
  for _, column in ipairs(COUNTED) do
    if user[column] > 0 then room.total[column] = room.total[column] - 1 end
  end
  user.exempt = true
  users[name] = user
  room.owners = room.owners + 1
  return true
end

function Seats.rename(now, alias, identity, name)
  for _, hold in ipairs(sessions_with(alias, identity)) do
    local nobody = hold.user
    if nobody ~= name then
      count(hold, -1)
      hold.user = name
      count(hold, 1)
      write(field_of(hold), hold)
      forget(nobody)
    end
  end
end

-- Take over a hold that another run or another guard issued.
function Seats.restore(now, hold_id, user, alias, identity, present, expires, device)
  if hold_with(hold_id) then return end
  put_reserved(key_of(alias, identity), {
    id = hold_id, user = user, state = present and 'left' or 'issued', alias = alias, identity = identity, sid = '',
    began = now, expires = present and math.min(now, expires) or expires, device = device,
  })
  room.vacated = math.max(room.vacated, now)
end

-- The sessions of an identity came with a token that had a seat.
function Seats.seat_sessions(now, alias, identity, user)
  Seats.rename(now, alias, identity, user)
  for _, hold in ipairs(sessions_with(alias, identity)) do
    if hold.state == 'unseated' then move(hold, 'seat', now) end
  end
end

function Seats.knows(alias, identity)
  local key = key_of(alias, identity)
  return reserved[key] ~= nil or sessions_of[key] ~= nil
end

-- Requests in flight end, and every SFU room has to be listed again: the data set may be an older one.
function Seats.distrust(now)
  for _, hold in ipairs(in_order(Store.all('p'))) do move(hold, 'release', now) end
  room.listed = {}
  room.version = room.version + 1
end

-- The server's clock was set back: what was written before counts from the new time.
function Seats.shift(by)
  room.unlimited_at, room.touched, room.vacated = room.unlimited_at + by, room.touched + by, room.vacated + by
  if room.waited_until then room.waited_until = room.waited_until + by end
  for alias, since in pairs(room.listed) do room.listed[alias] = since + by end
  for _, letter in ipairs({'p', 's', 'r'}) do
    for _, hold in ipairs(Store.all(letter)) do
      hold.began, hold.expires = hold.began + by, hold.expires + by
      if hold.lease then hold.lease = hold.lease + by end
      write(field_of(hold), hold)
    end
  end
  for _, name in ipairs(Store.names('c')) do
    local chain = read(name)
    write(name, {expires = chain.expires + by, asked = chain.asked + by})
  end
  for _, times in ipairs({due, unconfirmed, ended}) do
    for _, found in ipairs(times.up_to()) do times.put(found[1], found[2] + by) end
  end
end

-- How many requests in flight of a guard are renewed.
function Seats.renew(now, hold_ids, lease)
  local renewed = 0
  for _, hold_id in ipairs(hold_ids) do
    local hold = pending[hold_id]
    if hold then
      hold.lease = lease
      pending[hold_id] = hold
      due.put(field_of(hold), lease)
      renewed = renewed + 1
    end
  end
  return renewed
end

-- Drop what no delayed event can refer to any more.
function Seats.forget_old(now, ttl, listing_kept)
  forget_ended(now)
  for _, hold in ipairs(to_confirm(now - UNCONFIRMED_KEPT + 1)) do
    if hold.expires + UNCONFIRMED_KEPT <= now then move(hold, 'confirm', now) end
  end
  for alias, since in pairs(room.listed) do
    if not room.aliases[alias] and since < now - listing_kept then room.listed[alias] = nil end
  end
end

-- questions --------------------------------------------------------------------------------------------------------

local function names_of(holds)
  local names, seen = {}, {}
  for _, hold in ipairs(holds) do
    if not seen[hold.user] then
      seen[hold.user] = true
      names[#names + 1] = hold.user
    end
  end
  return names
end

function Seats.owns_seat(now, user) return owns_seat(user) end
function Seats.is_exempt(now, user) return user_of(user).exempt == true end
function Seats.seats_taken(now) return room.total.takes_seat end

function Seats.sessions(now) return in_call() end
function Seats.users(now) return names_of(in_call()) end

-- Users who have a seat, have no request in flight, and are not in the call as far as we know.
function Seats.awaited(now)
  local awaited = {}
  for _, hold in ipairs(in_order(Store.all('r'))) do
    if TABLE[hold.state].owns_seat then awaited[#awaited + 1] = hold end
  end
  return names_of(awaited)
end

-- Users who are in the call, have a token in time, or have a request in flight.
function Seats.occupants(now)
  local names = {}
  for _, name in ipairs(Store.names('u')) do
    if read(name).occupies > 0 then names[#names + 1] = name:sub(2) end
  end
  return names
end

-- The number of the last change of who is an occupant, and what has changed since a number: all of them, unless that was
-- a short while ago.
function Seats.occupants_since(now, number)
  number_changes()
  local changes = {}
  if not number or number > room.news or room.news - number > NEWS_KEPT then
    return {digits(room.news), Seats.occupants(now), changes}
  end
  for one = number + 1, room.news do changes[#changes + 1] = news[digits(one)] end
  return {digits(room.news), false, changes}
end

-- Whether anybody is in the call of whom no Matrix user is known.
function Seats.has_strangers() return room.strangers ~= nil end

function Seats.aliases(now)
  local names = {}
  for alias in pairs(room.aliases) do
    if alias ~= '' then names[#names + 1] = alias end
  end
  return names
end

function Seats.listing_required_since(now) return unconfirmed.highest() end

function Seats.is_idle(now) return room.users == 0 end

-- Whether anybody is in the call or has a token in time, as far as we know; requests in flight do not count.
function Seats.is_occupied(now)
  return how_many({'present', 'unseated', 'issued', 'issued_unseated', 'reconnecting'}) > 0
end

-- Write the room. It is deleted after so many seconds.
function Seats.close(seconds)
  number_changes()
  Store.write(seconds)
end
