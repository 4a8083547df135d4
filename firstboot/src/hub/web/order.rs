//! One attempt to get a certificate: account, order, challenges, and the certificate. Each step is stored in etcd before
//! the next one, so that another hub continues after a power cut.

use std::sync::Arc;
use std::time::Duration;

use fleet::{PrivateKey, Web, encoding};
use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, ChallengeType, ExternalAccountKey, Identifier, Key, NewAccount,
    NewOrder, Order, OrderStatus, RetryPolicy,
};
use tokio::time::sleep;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tracing::{info, warn};

use super::answers::is_token;
use super::certificate::WebCertificate;
use super::directory::{DirectoryClient, Wait};
use super::records::{Account as AccountRecord, Lock, PendingOrder, Records};
use crate::error::{Error, Result};

/// Most authorizations in an order: the hubs order one name.
const MOST: usize = 4;

/// What an attempt needs.
pub(super) struct Ordering<'a> {
    pub(super) records: &'a Records,
    pub(super) lock: &'a Lock,
    pub(super) web: &'a Web,
    /// HMAC key for external-account binding.
    pub(super) eab: Option<Vec<u8>>,
    pub(super) tls: Arc<ClientConfig>,
    pub(super) wait: Wait,
    /// Time after which every hub answers a challenge that is in etcd.
    pub(super) spread: Duration,
    /// Time limit for the authority's check, and for its signature.
    pub(super) patience: Duration,
}

impl Ordering<'_> {
    /// Orders the certificate, or continues the order in etcd.
    ///
    /// # Errors
    /// If the directory or etcd does not answer, or the authority refuses.
    pub(super) async fn certificate(&self, pending: Option<PendingOrder>) -> Result<WebCertificate> {
        let name = self.web.name.as_deref().unwrap_or_default();
        let mut account = self.account().await?;
        let (mut order, key) = self.order(&mut account, name, pending).await?;
        if order.state().status == OrderStatus::Pending {
            self.answer(&mut order).await?;
            order.poll_ready(&self.retries()).await.map_err(|e| api(&e))?;
        }
        if order.state().status == OrderStatus::Ready {
            let csr = PrivateKey::from_pem(key.clone())?.request(name)?;
            order.finalize_csr(&csr).await.map_err(|e| api(&e))?;
        }
        if order.state().status == OrderStatus::Invalid {
            self.records.forget_order(self.lock).await?;
            let state = order.state();
            let why = state.error.as_ref().map_or_else(|| "no reason given".to_owned(), ToString::to_string);
            let why = format!("{why}{}", refused(&mut order).await);
            return Err(Error::Failed(format!("the authority refuses the order for {name}: {why}")));
        }
        let chain = order.poll_certificate(&self.retries()).await.map_err(|e| api(&e))?;
        match WebCertificate::new(name, &self.web.authority.directory, &chain, &key) {
            Ok(certificate) => Ok(certificate),
            Err(e) => {
                self.records.forget_order(self.lock).await?;
                Err(e)
            }
        }
    }

    /// Returns the fleet's account. The first hub makes it.
    async fn account(&self) -> Result<Account> {
        let authority = &self.web.authority;
        let client = || Account::builder_with_http(Box::new(DirectoryClient::new(self.tls.clone(), self.wait.clone())));
        let (mut record, mut revision) = self.records.account().await?;
        let contact: Vec<String> = authority.email.iter().map(|email| format!("mailto:{email}")).collect();
        let contact: Vec<&str> = contact.iter().map(String::as_str).collect();
        if let Some(value) = &record.credentials {
            let credentials: AccountCredentials =
                serde_json::from_value(value.clone()).map_err(Error::json("an account"))?;
            let account = client().from_credentials(credentials).await.map_err(|e| api(&e))?;
            if record.email != authority.email {
                if let Err(e) = account.update_contacts(&contact).await {
                    if is_unknown_account(&e) {
                        self.forget_account().await?;
                    }
                    return Err(api(&e));
                }
                record.email.clone_from(&authority.email);
                self.records.put_account(&record, revision).await?;
            }
            return Ok(account);
        }
        let directory = authority.directory.clone();
        let (account, credentials) = if let Some(id) = &authority.eab_key_id {
            let hmac = self.eab.as_ref().ok_or_else(|| {
                Error::Failed("the HMAC key for external-account binding is missing: type `bakehouse secret acme_eab`, and publish".into())
            })?;
            let binding = ExternalAccountKey::new(id.clone(), hmac);
            let new = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
            client().create(&new, directory, Some(&binding)).await.map_err(|e| api(&e))?
        } else {
            if record.key.is_none() {
                let (_, key) = Key::generate_pkcs8().map_err(|e| api(&e))?;
                record.key = Some(encoding::encode(key.secret_pkcs8_der()));
                self.records.put_account(&record, revision).await?;
                // If another hub was faster, its key counts.
                (record, revision) = self.records.account().await?;
            }
            let key = record.key.as_deref().and_then(encoding::decode);
            let key = key.ok_or_else(|| Error::Failed("the account's key in etcd is damaged".to_owned()))?;
            let pkcs8 = PrivatePkcs8KeyDer::from(key);
            let pair = (Key::from_pkcs8_der(pkcs8.clone_key()).map_err(|e| api(&e))?, PrivateKeyDer::Pkcs8(pkcs8));
            // For a key that the directory knows, it returns the account.
            let (account, credentials) = client().create_from_key(pair, directory).await.map_err(|e| api(&e))?;
            if !contact.is_empty() {
                account.update_contacts(&contact).await.map_err(|e| api(&e))?;
            }
            (account, credentials)
        };
        let value = serde_json::to_value(&credentials).map_err(Error::json("an account"))?;
        let record = AccountRecord { key: None, credentials: Some(value), email: authority.email.clone() };
        if self.records.put_account(&record, revision).await? {
            info!("the fleet has the account {} at {}", account.id(), authority.directory);
        }
        Ok(account)
    }

    /// Returns the order in etcd if the directory still has it, else a new one, with its private key.
    async fn order(&self, account: &mut Account, name: &str, pending: Option<PendingOrder>) -> Result<(Order, String)> {
        if let Some(PendingOrder { url, key }) = pending {
            match account.order(url.clone()).await {
                Ok(mut order) => {
                    if order.state().status != OrderStatus::Invalid {
                        return Ok((order, key));
                    }
                    warn!("the authority no longer accepts the order {url}: ordering again");
                }
                // The directory has forgotten the order.
                Err(instant_acme::Error::Api(e)) if !self.is_to_wait() => warn!("cannot continue the order {url}: {e}"),
                Err(e) => return Err(api(&e)),
            }
        }
        let identifiers = [Identifier::Dns(name.to_owned())];
        let key = PrivateKey::generate()?.pem().to_owned();
        let new = NewOrder::new(&identifiers);
        let mut placed = account.new_order(&new).await;
        if placed.as_ref().is_err_and(is_unknown_account) {
            warn!("the directory does not know the account {} any more: registering another one", account.id());
            self.forget_account().await?;
            *account = self.account().await?;
            placed = account.new_order(&new).await;
        }
        let order = placed.map_err(|e| api(&e))?;
        let pending = PendingOrder { url: order.url().to_owned(), key: key.clone() };
        self.records.put_order(self.lock, &pending).await?;
        info!("ordered a certificate for {name}: {}", order.url());
        Ok((order, key))
    }

    /// Removes the account from etcd, because the directory does not know it any more. Its key stays.
    async fn forget_account(&self) -> Result<()> {
        let (record, revision) = self.records.account().await?;
        let credentials = record.credentials.and_then(|value| serde_json::from_value::<AccountCredentials>(value).ok());
        let key = credentials.map(|own| encoding::encode(own.private_key().secret_pkcs8_der()));
        let record = AccountRecord { key, credentials: None, email: None };
        self.records.put_account(&record, revision).await.map(drop)
    }

    fn is_to_wait(&self) -> bool {
        self.wait.get().is_some()
    }

    /// Stores the answers to the order's challenges, and tells the authority that it may ask.
    async fn answer(&self, order: &mut Order) -> Result<()> {
        let mut all = order.authorizations();
        for _ in 0..MOST {
            let Some(authorization) = all.next().await else { return Ok(()) };
            let mut authorization = authorization.map_err(|e| api(&e))?;
            if authorization.status != AuthorizationStatus::Pending {
                continue;
            }
            let Some(mut challenge) = authorization.challenge(ChallengeType::Http01) else {
                return Err(Error::Failed("the authority offers no challenge of the type http-01".to_owned()));
            };
            if !is_token(&challenge.token) {
                return Err(Error::Failed("the token of the authority's challenge is not base64url".to_owned()));
            }
            let answer = challenge.key_authorization();
            self.records.put_challenge(&challenge.token, answer.as_str()).await?;
            // The authority asks any hub, and a hub reads etcd at most once a second for a token that it does not know.
            sleep(self.spread).await;
            challenge.set_ready().await.map_err(|e| api(&e))?;
        }
        Err(Error::Failed(format!("the order has more than {MOST} authorizations")))
    }

    fn retries(&self) -> RetryPolicy {
        RetryPolicy::new().initial_delay(Duration::from_secs(1)).backoff(1.5).timeout(self.patience)
    }
}

/// Returns the errors of the authority's checks.
async fn refused(order: &mut Order) -> String {
    let mut text = String::new();
    let mut all = order.authorizations();
    for _ in 0..MOST {
        let Some(Ok(authorization)) = all.next().await else { break };
        let errors = authorization.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        errors.for_each(|e| text += &format!("; {e}"));
    }
    text
}

fn is_unknown_account(e: &instant_acme::Error) -> bool {
    let instant_acme::Error::Api(problem) = e else { return false };
    problem.r#type.as_ref().is_some_and(|kind| kind.ends_with(":accountDoesNotExist"))
}

fn api(e: &instant_acme::Error) -> Error {
    Error::Failed(e.to_string())
}
